#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/simd_target.h"
#include "patch_scores/patch_grid.h"

namespace glance {
namespace {

// Numbers that are computed side by side in one register: as the compiler's own type where it has
// one, of a width that the target chooses.
template <typename A, int kBytes>
struct Vector {
#if defined(__GNUC__) || defined(__clang__)
  typedef A type __attribute__((vector_size(kBytes)));
  static constexpr int kLanes = kBytes / sizeof(A);
#else
  typedef A type;
  static constexpr int kLanes = 1;
#endif
};

template <typename A>
const A* table_row(const PatchGridParams& p, int64_t y, int64_t i) {
  return static_cast<const A*>(p.table) +
         distance_index(y, p.rows.starts[i], p.rows.patch) * p.table_pitch + p.table_origin;
}

// sum[image][x] = sum over all patches of weight * score, for kVectors vectors of pixels of row y
// from x on and kImages images, whose scores are side by side: scores[patch * kImages + image].
// Patch rows add up on their own first, which keeps rounding small.
template <typename A, int kBytes, int kImages, int kVectors>
GLANCE_INLINE void idw_block(const PatchGridParams& p, int64_t y, int64_t x, const A* scores,
                             A* sums, int64_t pitch) {
  using V = typename Vector<A, kBytes>::type;
  constexpr int kLanes = Vector<A, kBytes>::kLanes;
  V total[kImages][kVectors] = {};
  for (int64_t i = 0; i < p.rows.count; ++i) {
    const A* table = table_row<A>(p, y, i) + x;
    V sum[kImages][kVectors] = {};
    for (int64_t j = 0; j < p.columns.count; ++j, scores += kImages) {
      V weight[kVectors];
      std::memcpy(weight, table - p.columns.starts[j], sizeof(weight));
      GLANCE_UNROLL
      for (int n = 0; n < kImages; ++n) {
        GLANCE_UNROLL
        for (int v = 0; v < kVectors; ++v) sum[n][v] += weight[v] * scores[n];
      }
    }
    GLANCE_UNROLL
    for (int n = 0; n < kImages; ++n) {
      GLANCE_UNROLL
      for (int v = 0; v < kVectors; ++v) total[n][v] += sum[n][v];
    }
  }
  for (int n = 0; n < kImages; ++n) {
    std::memcpy(sums + n * pitch, total[n], kVectors * kLanes * sizeof(A));
  }
}

// grad[image] of kPatches patches of one patch row from patch j on = sum over all pixels of
// weight * share, for kImages images. Rows of pixels add up on their own first.
template <typename A, int kBytes, int kImages, int kPatches>
GLANCE_INLINE void idw_backward_block(const PatchGridBackwardParams& p, int64_t n, int64_t i,
                                      int64_t j, A* grads) {
  using V = typename Vector<A, kBytes>::type;
  constexpr int kLanes = Vector<A, kBytes>::kLanes;
  const int64_t image = p.rows.size * p.share_pitch;
  V total[kImages][kPatches] = {};
  for (int64_t y = 0; y < p.rows.size; ++y) {
    const A* table = table_row<A>(p, y, i);
    const A* share = static_cast<const A*>(p.share) + n * image + y * p.share_pitch;
    V sum[kImages][kPatches] = {};
    for (int64_t x = 0; x < p.columns.size; x += kLanes) {
      V weight[kPatches];
      GLANCE_UNROLL
      for (int k = 0; k < kPatches; ++k) {
        std::memcpy(&weight[k], table + x - p.columns.starts[j + k], sizeof(V));
      }
      GLANCE_UNROLL
      for (int m = 0; m < kImages; ++m) {
        V part;
        std::memcpy(&part, share + m * image + x, sizeof(V));
        GLANCE_UNROLL
        for (int k = 0; k < kPatches; ++k) sum[m][k] += weight[k] * part;
      }
    }
    GLANCE_UNROLL
    for (int m = 0; m < kImages; ++m) {
      GLANCE_UNROLL
      for (int k = 0; k < kPatches; ++k) total[m][k] += sum[m][k];
    }
  }
  for (int m = 0; m < kImages; ++m) {
    for (int k = 0; k < kPatches; ++k) {
      A lanes[kLanes];
      std::memcpy(lanes, &total[m][k], sizeof(V));
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
      }
      grads[m * kPatches + k] = lanes[0];
    }
  }
}

// The blocks of one instruction set: 8 images and 1, and how many pixels or patches at a time.
template <typename A>
struct IdwKernels {
  using Forward = void (*)(const PatchGridParams&, int64_t y, int64_t x, const A* scores, A* sums,
                           int64_t pitch);
  using Backward = void (*)(const PatchGridBackwardParams&, int64_t n, int64_t i, int64_t j,
                            A* grads);
  int pixels;  // of a forward block, which divides kGridPad
  Forward images4, image1;
  Backward images4_patches4, images4_patch1, image1_patches4, image1_patch1;
};

#define GLANCE_IDW_KERNELS(name, target, bytes)                                                    \
  template <typename A>                                                                            \
  struct name {                                                                                    \
    static constexpr int kVectors = bytes >= 32 ? 2 : 1;                                           \
    template <int kImages>                                                                         \
    target static void forward(const PatchGridParams& p, int64_t y, int64_t x, const A* scores,    \
                               A* sums, int64_t pitch) {                                           \
      idw_block<A, bytes, kImages, kVectors>(p, y, x, scores, sums, pitch);                        \
    }                                                                                              \
    template <int kImages, int kPatches>                                                           \
    target static void backward(const PatchGridBackwardParams& p, int64_t n, int64_t i, int64_t j, \
                                A* grads) {                                                        \
      idw_backward_block<A, bytes, kImages, kPatches>(p, n, i, j, grads);                          \
    }                                                                                              \
    static constexpr IdwKernels<A> kAll = {kVectors * Vector<A, bytes>::kLanes,                    \
                                           &forward<4>,                                            \
                                           &forward<1>,                                            \
                                           &backward<4, 4>,                                        \
                                           &backward<4, 1>,                                        \
                                           &backward<1, 4>,                                        \
                                           &backward<1, 1>};                                       \
  }

GLANCE_IDW_KERNELS(PlainIdw, , 16);
#ifdef GLANCE_X86
GLANCE_IDW_KERNELS(Avx2Idw, GLANCE_TARGET_AVX2, 32);
GLANCE_IDW_KERNELS(Avx512Idw, GLANCE_TARGET_AVX512, 64);
#endif

template <typename A>
const IdwKernels<A>& idw_kernels() {
#ifdef GLANCE_X86
  switch (best_simd_target()) {
    case SimdTarget::kAvx512:
      return Avx512Idw<A>::kAll;
    case SimdTarget::kAvx2:
      return Avx2Idw<A>::kAll;
    case SimdTarget::kPlain:
      break;
  }
#endif
  return PlainIdw<A>::kAll;
}

constexpr int64_t kImages = 4;

// The patch whose centre is at each pixel of an axis, or -1.
std::vector<int32_t> centred(const PatchAxis& axis) {
  std::vector<int32_t> patch(axis.size, -1);
  if (axis.patch % 2 == 1) {
    for (int64_t i = 0; i < axis.count; ++i) {
      patch[axis.starts[i] + axis.patch / 2] = static_cast<int32_t>(i);
    }
  }
  return patch;
}

// One row of the map of each of `images` images from n on, whose scores are in `wide`.
template <typename T, typename A>
void idw_row(const PatchGridParams& p, int64_t n, int64_t images, int64_t y, const A* wide,
             int32_t row_centred, const std::vector<int32_t>& column_centred, A* sums,
             int64_t pitch) {
  const IdwKernels<A>& kernels = idw_kernels<A>();
  const int64_t width = p.columns.size;
  for (int64_t x = 0; x < width; x += kernels.pixels) {
    (images == 1 ? kernels.image1 : kernels.images4)(p, y, x, wide, sums + x, pitch);
  }
  const T* scores = static_cast<const T*>(p.scores);
  const A* total = p.total ? static_cast<const A*>(p.total) + y * width : nullptr;
  for (int64_t m = 0; m < images; ++m) {
    T* map = static_cast<T*>(p.map) + ((n + m) * p.rows.size + y) * width;
    const A* sum = sums + m * pitch;
    for (int64_t x = 0; x < width; ++x) map[x] = narrow<T>(total ? sum[x] / total[x] : sum[x]);
    if (row_centred < 0 || !total) continue;
    // On a centre there is that patch alone.
    for (int64_t x = 0; x < width; ++x) {
      if (column_centred[x] < 0) continue;
      map[x] = scores[((n + m) * p.rows.count + row_centred) * p.columns.count + column_centred[x]];
    }
  }
}

template <typename T>
void idw_rows(const PatchGridParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t patches = p.rows.count * p.columns.count;
  const int64_t pitch = (p.columns.size + kGridPad - 1) / kGridPad * kGridPad;
  const std::vector<int32_t> row_centred = centred(p.rows), column_centred = centred(p.columns);
  std::vector<A> wide(kImages * patches), sums(kImages * pitch);
  for (int64_t n = 0; n < p.batch;) {
    const int64_t left = p.batch - n;
    // A last few images are cheaper together with empty places than one by one.
    const int64_t images = std::min(left, kImages), places = images == 1 ? 1 : kImages;
    const T* scores = static_cast<const T*>(p.scores) + n * patches;
    for (int64_t m = 0; m < places; ++m) {
      for (int64_t i = 0; i < patches; ++i) {
        wide[i * places + m] = m < images ? widen(scores[m * patches + i]) : A(0);
      }
    }
    for (int64_t y = begin; y < end; ++y) {
      idw_row<T, A>(p, n, images, y, wide.data(), row_centred[y], column_centred, sums.data(),
                    pitch);
    }
    n += images;
  }
}

// grad_map / total, but 0 on centres, where only one patch has a part.
template <typename T>
void share_rows(const PatchGridBackwardParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t width = p.columns.size;
  const std::vector<int32_t> row_centred = centred(p.rows), column_centred = centred(p.columns);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t y = row % p.rows.size;
    const T* grad = static_cast<const T*>(p.grad_map) + row * width;
    const A* total = static_cast<const A*>(p.total) + y * width;
    A* share = static_cast<A*>(p.share) + row * p.share_pitch;
    for (int64_t x = 0; x < width; ++x) {
      const bool on_centre = row_centred[y] >= 0 && column_centred[x] >= 0;
      share[x] = on_centre ? A(0) : widen(grad[x]) / total[x];
    }
    std::fill(share + width, share + p.share_pitch, A(0));
  }
}

template <typename T>
void idw_backward_patches(const PatchGridBackwardParams& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const IdwKernels<A>& kernels = idw_kernels<A>();
  const int64_t count = p.columns.count, patches = p.rows.count * count;
  const int64_t pixels = p.rows.size * p.columns.size;
  const bool centred_rows = p.rows.patch % 2 == 1, centred_columns = p.columns.patch % 2 == 1;
  const T* grad_map = static_cast<const T*>(p.grad_map);
  T* grad_scores = static_cast<T*>(p.grad_scores);
  A grads[kImages * 4];
  for (int64_t patch = begin; patch < end;) {
    const int64_t i = patch / count, j = patch % count;
    const int64_t run = std::min(count - j, end - patch) >= 4 ? 4 : 1;
    for (int64_t n = 0; n < p.batch;) {
      const int64_t images = p.batch - n >= kImages ? kImages : 1;
      const auto kernel = images == 1
                              ? (run == 1 ? kernels.image1_patch1 : kernels.image1_patches4)
                              : (run == 1 ? kernels.images4_patch1 : kernels.images4_patches4);
      kernel(p, n, i, j, grads);
      for (int64_t m = 0; m < images; ++m) {
        for (int64_t k = 0; k < run; ++k) {
          A grad = grads[m * run + k];
          if (centred_rows && centred_columns) {
            const int64_t y = p.rows.starts[i] + p.rows.patch / 2;
            const int64_t x = p.columns.starts[j + k] + p.columns.patch / 2;
            grad += widen(grad_map[(n + m) * pixels + y * p.columns.size + x]);
          }
          grad_scores[(n + m) * patches + patch + k] = narrow<T>(grad);
        }
      }
      n += images;
    }
    patch += run;
  }
}

}  // namespace

void aggregate_idw_grid_cpu(const PatchGridParams& params, int64_t begin, int64_t end) {
  dispatch_cpu(params.dtype,
               [&](auto tag) { idw_rows<typename decltype(tag)::type>(params, begin, end); });
}

void aggregate_idw_grid_prepare_cpu(const PatchGridBackwardParams& params, int64_t begin,
                                    int64_t end) {
  dispatch_cpu(params.dtype,
               [&](auto tag) { share_rows<typename decltype(tag)::type>(params, begin, end); });
}

void aggregate_idw_grid_backward_cpu(const PatchGridBackwardParams& params, int64_t begin,
                                     int64_t end) {
  dispatch_cpu(params.dtype, [&](auto tag) {
    idw_backward_patches<typename decltype(tag)::type>(params, begin, end);
  });
}

}  // namespace glance
