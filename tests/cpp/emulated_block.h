// A CUDA block on a CPU, for csrc/implicit_gemm/gemm_kernel.h: warps one after the other within
// a phase, in either order; asynchronous copies that arrive at once or as late as they may; and
// what mma and ldmatrix do with the registers of 32 lanes, from the layouts in NVIDIA's PTX manual.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "check.h"
#include "implicit_gemm/gemm_kernel.h"

namespace glance_test {

// Memory aligned like CUDA's.
class Aligned {
 public:
  explicit Aligned(int64_t bytes) : storage_(bytes + 32, '\xcb') {}
  char* data() {
    char* start = storage_.data();
    return start + (16 - reinterpret_cast<uintptr_t>(start) % 16) % 16;
  }

 private:
  std::vector<char> storage_;
};

// A step that lacks a barrier or a wait shows under one of the four.
struct Schedule {
  bool backwards;
  bool late_copies;
};

// Memory that the block may read or write.
struct Range {
  const char* begin;
  int64_t bytes;
  bool holds(const char* at, int64_t size) const {
    return at >= begin && at + size <= begin + bytes;
  }
};

class EmulatedWarp {
 public:
  int index;

  EmulatedWarp(int index, Schedule schedule, Range shared, const std::vector<Range>& inputs)
      : index(index), schedule_(schedule), shared_(shared), inputs_(&inputs), groups_(1) {}

  template <typename V>
  struct Lanes {
    V values[32];
    V& operator[](int lane) { return values[lane]; }
    const V& operator[](int lane) const { return values[lane]; }
  };

  template <typename F>
  void lanes(F&& body) {
    for (int i = 0; i < 32; ++i) body(schedule_.backwards ? 31 - i : i);
  }

  template <typename F>
  bool any(F&& body) {
    bool found = false;
    lanes([&](int lane) { found = body(lane) || found; });
    return found;
  }

  template <int kBytes>
  void copy(int, char* to, const char* from, bool some) {
    EXPECT(reinterpret_cast<uintptr_t>(to) % kBytes == 0);
    EXPECT(reinterpret_cast<uintptr_t>(from) % kBytes == 0);
    EXPECT(shared_.holds(to, kBytes));
    bool inside = !some;
    for (const Range& input : *inputs_) inside = inside || input.holds(from, kBytes);
    EXPECT(inside);
    groups_.back().push_back({to, from, kBytes, some});
    if (!schedule_.late_copies) perform(groups_.back().back());
  }

  void end_copies() { groups_.emplace_back(); }

  // All groups arrive but the last kPending that have ended.
  template <int kPending>
  void wait_for_copies() {
    while (groups_.size() > kPending + 1) {
      if (schedule_.late_copies) {
        for (const Copy& copy : groups_.front()) perform(copy);
      }
      groups_.erase(groups_.begin());
    }
  }

  // ldmatrix.x4: lanes 8i to 8i + 7 name the rows of matrix i; lane l gets from each matrix the
  // l % 4-th word of row l / 4.
  template <typename F>
  void load_matrices(Lanes<glance::Words>& to, F&& row) {
    const char* rows[32];
    for (int lane = 0; lane < 32; ++lane) {
      rows[lane] = row(lane);
      EXPECT(shared_.holds(rows[lane], 16));
      EXPECT(reinterpret_cast<uintptr_t>(rows[lane]) % 16 == 0);
    }
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned banks = 0;  // groups of four, of the eight
      for (int i = 0; i < 8; ++i) banks |= 1u << (rows[matrix * 8 + i] - shared_.begin) / 16 % 8;
      EXPECT(banks == 0xff);
      for (int lane = 0; lane < 32; ++lane) {
        std::memcpy(&to[lane].word[matrix], rows[matrix * 8 + lane / 4] + lane % 4 * 4, 4);
      }
    }
  }

  // cvt.rna.tf32: to 10 bits of fraction, halves away from zero.
  void round_to_tf32(Lanes<glance::Words>& words) {
    for (glance::Words& lane : words.values) {
      for (uint32_t& word : lane.word) word = tf32_bits(word);
    }
  }
  static uint32_t tf32_bits(uint32_t word) {
    const bool finite = (word & 0x7f800000u) != 0x7f800000u;
    return finite ? (word + 0x1000u) & ~0x1fffu : word;
  }

  template <typename T, typename Sums>
  void multiply(Sums& sums, int at, const Lanes<glance::Words>& a, const Lanes<glance::Words>& b,
                int first) {
    constexpr int kPerWord = 4 / sizeof(T), kDepth = 8 * kPerWord;
    float rows[16][kDepth], columns[kDepth][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, in_group = lane % 4;
      for (int word = 0; word < 4; ++word) {
        for (int i = 0; i < kPerWord; ++i) {
          const int depth = in_group * kPerWord + i + word / 2 * kDepth / 2;
          rows[group + word % 2 * 8][depth] = value<T>(a[lane].word[word], i);
        }
      }
      for (int word = 0; word < 2; ++word) {
        for (int i = 0; i < kPerWord; ++i) {
          const int depth = in_group * kPerWord + i + word * kDepth / 2;
          columns[depth][group] = value<T>(b[lane].word[first + word], i);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int depth = 0; depth < kDepth; ++depth) {
          sums[lane].values[at + i] += rows[row][depth] * columns[depth][column];
        }
      }
    }
  }

  template <typename T>
  glance::accumulate_t<T> widened(T value) const {
    return glance::widen(value);
  }
  template <typename T>
  T narrowed(glance::accumulate_t<T> value) const {
    return glance::narrow<T>(value);
  }

 private:
  struct Copy {
    char* to;
    const char* from;
    int bytes;
    bool some;
  };

  static void perform(const Copy& copy) {
    if (copy.some) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      std::memset(copy.to, 0, copy.bytes);
    }
  }

  // What the tensor cores make of a register: of TF32 they ignore the lowest 13 bits.
  template <typename T>
  static float value(uint32_t word, int i) {
    if constexpr (std::is_same_v<T, float>) {
      return glance::bits_to_float(word & ~0x1fffu);
    } else {
      return glance::widen(T{static_cast<uint16_t>(word >> 16 * i)});
    }
  }

  Schedule schedule_;
  Range shared_;
  const std::vector<Range>* inputs_;
  std::vector<std::vector<Copy>> groups_;
};

class EmulatedBlock {
 public:
  using Warp = EmulatedWarp;

  template <typename V>
  struct Registers {
    std::vector<EmulatedWarp::Lanes<V>> warps = std::vector<EmulatedWarp::Lanes<V>>(32);
    EmulatedWarp::Lanes<V>& operator[](int warp) { return warps[warp]; }
  };

  EmulatedBlock(int threads, Schedule schedule, Range shared, const std::vector<Range>& inputs)
      : schedule_(schedule) {
    for (int i = 0; i < threads / 32; ++i) warps_.emplace_back(i, schedule, shared, inputs);
  }

  template <typename F>
  void phase(F&& body) {
    const int count = static_cast<int>(warps_.size());
    for (int i = 0; i < count; ++i) body(warps_[schedule_.backwards ? count - 1 - i : i]);
  }
  template <typename F>
  bool any(F&& body) {
    bool found = false;
    phase([&](EmulatedWarp& warp) { found = body(warp) || found; });
    return found;
  }

 private:
  Schedule schedule_;
  std::vector<EmulatedWarp> warps_;
};

// What launch_gemm() does, in its order, with a loop over blocks in place of the launch. `pixels`
// is the memory that the work reads pixels from; `w.packed` is workspace.
template <typename Tile, typename Work>
void run_gemm(const Work& w, Schedule schedule, std::vector<Range> pixels) {
  using T = typename Tile::T;
  T* packed = static_cast<T*>(w.packed);
  for (int64_t i = 0; i < w.packed_bytes() / int64_t(sizeof(T)); ++i) {
    const int64_t from = glance::packed_source<T>(w, i);
    T value = from < 0 ? T{} : static_cast<const T*>(w.weight)[from];
    if constexpr (std::is_same_v<T, float> && Tile::kMath == glance::Math::kTensor) {
      value = glance::bits_to_float(EmulatedWarp::tf32_bits(glance::float_to_bits(value)));
    }
    packed[i] = value;
  }
  pixels.push_back({static_cast<const char*>(w.packed), w.packed_bytes()});
  const int64_t bytes = glance::TileMemory<Tile, Work>::bytes(w.taps, w.steps);
  for (int64_t block = 0; block < w.blocks; ++block) {
    Aligned shared(bytes);
    EmulatedBlock emulated(Tile::kThreads, schedule, {shared.data(), bytes}, pixels);
    glance::convolve_tile<Tile>(emulated, w, block, shared.data());
  }
}

// What copied_pixels() does.
template <typename T>
const void* copied_pixels(const glance::GemmWork& w, const void* pixels, void* to, int64_t count) {
  const int64_t padded = w.groups * w.channels;
  for (int64_t i = 0; i < count * padded; ++i) {
    const int64_t from = glance::unpadded(i, w.groups * w.weight_channels, padded);
    static_cast<T*>(to)[i] = from < 0 ? T{} : static_cast<const T*>(pixels)[from];
  }
  return to;
}

}  // namespace glance_test
