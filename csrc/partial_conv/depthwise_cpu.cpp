// The fused path of depthwise layers, forward and backward. A unit of work is a band of rows of
// windows of one block of channels of one image. The rows of the input that a window sees stand in
// a ring in cache, masked, pixel after pixel in either layout, so that a vector is one pixel's
// channels and any stride and dilation is a step between pixels. Windows without a missing pixel
// read the input where it is, if it stands there the same way.
//
// Groups of 2 or 4 channels, in and out, are depthwise layers of as many times the taps: the
// ring has each row in that many orders, in the s-th of which channel c stands where c ^ s would,
// so that each channel of a group meets each other one in one of them.
#include <algorithm>
#include <vector>

#include "common/transpose.h"
#include "partial_conv/depthwise_loops.h"
#include "partial_conv/partial_conv.h"
#include "partial_conv/tile_rows.h"
#include "partial_conv/window_counts.h"

namespace glance {
namespace {

constexpr int64_t kRingBytes = 256 * 1024;
constexpr int64_t kOrderedRingBytes = 40 * 1024;  // of several orders, read as many times
constexpr int64_t kUnits = 16;    // at the least, to share among threads, if its rows are not fewer
constexpr int64_t kFewRows = 16;  // bands are not made smaller than this for it
constexpr int64_t kPart = 4;      // columns of the ring that are loaded together
constexpr int64_t kFewWhole = 16;  // windows; fewer are not worth a run of their own

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a call is cut into units: the same for any number of threads.
struct Plan {
  int64_t pitch, blocks;                // channels of a block, and how many make the image's
  int64_t rows, bands;                  // rows of windows of a band
  int64_t source_width, source_height;  // input that a row of windows sees, with padding
  int64_t grad_left, grad_width;        // gradients around a row of the input, zeros on the left
  int64_t grad_above;                   // rows of gradients above its own that an input row is in

  int64_t orders;  // of channels: as many as a group has

  Plan(const PartialConvParams& p, bool backward) : orders(p.in_channels / p.groups) {
    source_width = (p.out_width - 1) * p.stride[1] + (p.kernel[1] - 1) * p.dilation[1] + 1;
    source_height = (p.kernel[0] - 1) * p.dilation[0] + 1;
    grad_left = (p.kernel[1] - 1) * p.dilation[1] / p.stride[1];
    grad_above = (p.kernel[0] - 1) * p.dilation[0] / p.stride[0];
    grad_width =
        grad_left + std::max((p.in_width - 1 + p.padding[1]) / p.stride[1] + 1, p.out_width);
    const int64_t grads = backward ? (grad_above + 1) * grad_width : 0;
    const int64_t pixels = orders * (source_height * source_width + grads);
    const int64_t bytes = orders == 1 ? kRingBytes : kOrderedRingBytes;
    const int64_t most = bytes / int64_t(sizeof(float)) / pixels;
    blocks = 0;
    do {
      ++blocks;
      pitch = ceil_div(p.in_channels, blocks * kDepthwiseLanes) * kDepthwiseLanes;
    } while (pitch > std::max(most, p.channels_last ? 2 * kDepthwiseLanes : kDepthwiseLanes));
    blocks = ceil_div(p.in_channels, pitch);
    rows = p.out_height;
    while (rows > kFewRows && p.batch * blocks * ceil_div(p.out_height, rows) < kUnits) {
      rows = (rows + 1) / 2;
    }
    bands = ceil_div(p.out_height, rows);
  }
};

// Where a weight stands, of an input channel of the output's own group.
int64_t weight_place(const PartialConvParams& p, int64_t out_channel, int64_t in_channel,
                     int64_t place) {
  const int64_t in_group = in_channel & (p.in_channels / p.groups - 1);  // of a power of two
  return out_channel * p.weight_strides[0] + in_group * p.weight_strides[1] +
         place / p.kernel[1] * p.weight_strides[2] + place % p.kernel[1] * p.weight_strides[3];
}

template <typename T>
class Worker {
  struct Band {
    int64_t image, first, channels;  // of the block
    int64_t top, bottom;             // rows of windows
  };
  enum class Windows { kEmpty, kWhole, kOther };
  struct Run {
    int64_t begin, end;  // windows of a row
    Windows kind;
  };

 public:
  Worker(const PartialConvBackwardParams& p, const Plan& plan, bool backward)
      : p_(p),
        plan_(plan),
        loops_(depthwise_loops()),
        counts_(p),
        places_(p.kernel[0] * p.kernel[1]),
        taps_(plan.orders * places_),
        source_(plan.source_height * plan.orders * plan.source_width * plan.pitch),
        ratio_(p.out_width * (by_channel() ? plan.pitch : 1)),
        weight_(taps_ * plan.pitch),
        bias_(plan.pitch),
        row_(std::max(p.in_width, p.out_width) * plan.pitch),
        turned_(row_.size()),
        loaded_(plan.source_height * column_parts()) {
    if (!backward) return;
    grad_.resize((plan.grad_above + 1) * plan.orders * plan.grad_width * plan.pitch);
    if (p.result) result_.resize(p.out_width * plan.pitch);
  }

  void forward(int64_t unit) {
    const Band band = band_of(unit);
    load_weight(band, /*of_input=*/false);
    for (int64_t y = band.top; y < band.bottom; ++y) {
      load_ratio(band, y);
      store_valid(band, y);
      load_source(band, y);
      for (const Run& run : runs_) {
        const int64_t count = run.end - run.begin;
        const Row to = row_at(output_map(p_.output), pixels(band, y, p_.out_width), run.begin);
        if (run.kind == Windows::kEmpty) {
          clear(to, count);
          continue;
        }
        const int64_t step = p_.stride[1] * plan_.pitch;
        const Finish finish = finish_of(run.begin);
        list_taps(band, y, run);
        sum({nullptr, count, to.lanes, plan_.pitch, step, to.step, to.data, false, &finish});
      }
      if (!in_place(output_map(p_.output), band.channels)) {
        store_row(output_map(p_.output), pixels(band, y, p_.out_width));
      }
    }
  }

  // `sums`: of each tap and, last, of the bias, (taps + 1, pitch), over the band's windows.
  void backward(int64_t unit, float* sums) {
    const Band band = band_of(unit);
    if (p_.grad_input) load_weight(band, /*of_input=*/true);
    for (int64_t y = std::max<int64_t>(0, band.top - plan_.grad_above); y < band.bottom; ++y) {
      const bool own = y >= band.top;
      if (!own && !p_.grad_input) continue;
      load_ratio(band, y);
      float* grad = grad_row(y);
      load_gradient(band, y, grad, own ? sums + taps_ * plan_.pitch : bias_.data());
      if (!own) continue;
      if (p_.grad_weight) {
        load_source(band, y);
        add_gradients(band, y, grad, sums);
      }
      if (p_.grad_input) store_input_gradients(band, y);
    }
  }

 private:
  bool by_channel() const { return p_.mask_channels != 1; }

  // Whether pixels stand in the input as they would in the ring.
  bool reads_map() const {
    return std::is_same_v<T, float> && p_.channels_last && plan_.pitch == p_.in_channels &&
           !by_channel() && plan_.orders == 1;
  }

  Band band_of(int64_t unit) const {
    const int64_t top = unit % plan_.bands * plan_.rows;
    const int64_t first = unit / plan_.bands % plan_.blocks * plan_.pitch;
    return {unit / plan_.bands / plan_.blocks, first, std::min(plan_.pitch, p_.in_channels - first),
            top, std::min(top + plan_.rows, p_.out_height)};
  }

  // The first row of the input that rows of windows before `y` do not see.
  int64_t input_row(int64_t y) const {
    return std::clamp<int64_t>(y * p_.stride[0] - p_.padding[0], 0, p_.in_height);
  }

  static PixelRow pixels(const Band& band, int64_t y, int64_t count) {
    return {band.image, y, 0, count, band.first, band.channels};
  }
  FeatureMap<T> input_map(const void* data) const {
    return {static_cast<const T*>(data), p_.in_channels, p_.in_height, p_.in_width,
            p_.channels_last};
  }
  FeatureMap<T> output_map(const void* data) const {
    return {static_cast<const T*>(data), p_.out_channels, p_.out_height, p_.out_width,
            p_.channels_last};
  }

  float* grad_row(int64_t y, int64_t order = 0) {
    const int64_t slot = y % (plan_.grad_above + 1) * plan_.orders + order;
    return grad_.data() + (slot * plan_.grad_width + plan_.grad_left) * plan_.pitch;
  }
  // Rows count from the padding's first one.
  float* source_row(int64_t row, int64_t order = 0) {
    const int64_t slot = row % plan_.source_height * plan_.orders + order;
    return source_.data() + slot * plan_.source_width * plan_.pitch;
  }

  // As the outputs' channels meet the inputs', or `of_input` those the outputs'.
  void load_weight(const Band& band, bool of_input) {
    const T* weight = static_cast<const T*>(p_.weight);
    const T* bias = static_cast<const T*>(p_.bias);
    for (int64_t c = 0; c < band.channels; ++c) {
      bias_[c] = bias ? widen(bias[band.first + c]) : 0;
    }
    float* to = weight_.data();
    for (int64_t t = 0; t < taps_; ++t, to += plan_.pitch) {
      const int64_t order = t / places_, place = t % places_;
      for (int64_t c = 0; c < band.channels; ++c) {
        const int64_t channel = band.first + c, other = channel ^ order;
        to[c] = widen(of_input ? weight[weight_place(p_, other, channel, place)]
                               : weight[weight_place(p_, channel, other, place)]);
      }
    }
  }

  // The rows that row y of windows sees, masked, of which the ring has those of the row before it
  // in the band. Columns of padding are zeros from the beginning.
  void load_source(const Band& band, int64_t y) {
    const int64_t first = y * p_.stride[0], end = first + plan_.source_height;
    const int64_t there = y == band.top ? first : first - p_.stride[0] + plan_.source_height;
    for (int64_t row = std::max(first, there); row < end; ++row) {
      if (reads_map()) {
        std::fill_n(&loaded_[row % plan_.source_height * column_parts()], column_parts(), false);
      } else {
        load_columns(band, row, 0, p_.in_width);
      }
    }
    for (const Run& run : runs_) {
      if (reads_map() && run.kind == Windows::kOther) load_missing(band, y, run);
    }
  }

  // What windows see of rows that are not in the ring as a whole, and not there yet.
  void load_missing(const Band& band, int64_t y, const Run& run) {
    const int64_t span = (p_.kernel[1] - 1) * p_.dilation[1];
    const int64_t begin = std::max<int64_t>(run.begin * p_.stride[1] - p_.padding[1], 0);
    const int64_t end =
        std::min((run.end - 1) * p_.stride[1] - p_.padding[1] + span + 1, p_.in_width);
    for (int64_t i = 0; i < p_.kernel[0]; ++i) {
      const int64_t row = y * p_.stride[0] + i * p_.dilation[0];
      uint8_t* loaded = &loaded_[row % plan_.source_height * column_parts()];
      for (int64_t part = begin / kPart; part * kPart < end; ++part) {
        if (loaded[part]) continue;
        loaded[part] = true;
        load_columns(band, row, part * kPart, (part + 1) * kPart);
      }
    }
  }
  int64_t column_parts() const { return ceil_div(p_.in_width, kPart); }

  // Columns [begin, end) of the input, as far as a window sees them.
  void load_columns(const Band& band, int64_t row, int64_t begin, int64_t end) {
    begin = std::max<int64_t>(begin, 0);
    end = std::min({end, p_.in_width, plan_.source_width - p_.padding[1]});
    if (begin >= end) return;
    float* to = source_row(row) + (p_.padding[1] + begin) * plan_.pitch;
    const int64_t from = row - p_.padding[0];
    if (from < 0 || from >= p_.in_height) {
      std::fill_n(to, (end - begin) * plan_.pitch, 0.0f);
    } else {
      PixelRow at = pixels(band, from, end - begin);
      at.x = begin;
      load_row(input_map(p_.input), at, to);
      mask_pixels(p_, at, plan_.pitch, to);
    }
    for (int64_t order = 1; order < plan_.orders; ++order) {
      float* other = source_row(row, order) + (p_.padding[1] + begin) * plan_.pitch;
      loops_.reorder(order, to, (end - begin) * plan_.pitch, other);
    }
  }

  void load_ratio(const Band& band, int64_t y) {
    const int64_t n = p_.mask_batch == 1 ? 0 : band.image;
    if (!by_channel()) {
      const int64_t before = counts_.changes();
      const int32_t* counts = counts_.row(n, 0, y);
      if (counts_.changes() == before && !runs_.empty()) return;
      counts_.ratios(counts, 0, p_.out_width, ratio_.data());
      return list_runs();
    }
    runs_ = {{0, p_.out_width, Windows::kOther}};
    for (int64_t c = 0; c < band.channels; ++c) {
      const int32_t* counts = counts_.row(n, (band.first + c) / plan_.orders, y);
      for (int64_t x = 0; x < p_.out_width; ++x) {
        counts_.ratios(counts, x, x + 1, ratio_.data() + x * plan_.pitch + c);
      }
    }
  }

  void store_valid(const Band& band, int64_t y) {
    const int64_t n = p_.mask_batch == 1 ? 0 : band.image;
    if (p_.mask_batch == 1 && band.image != 0) return;
    if (!by_channel() && band.first != 0) return;
    for (int64_t c = 0; c < (by_channel() ? band.channels : 1); c += plan_.orders) {
      const int64_t group = (band.first + c) / plan_.orders;
      uint8_t* to = p_.valid + ((n * p_.ratio_groups() + group) * p_.out_height + y) * p_.out_width;
      const float* ratio = ratio_.data() + c;
      const int64_t step = by_channel() ? plan_.pitch : 1;
      for (int64_t x = 0; x < p_.out_width; ++x) to[x] = ratio[x * step] != 0;
    }
  }

  // Of windows of one kind. Few whole ones count as others, since a run has its own costs.
  void list_runs() {
    const auto kind_of = [&](int64_t x) {
      if (ratio_[x] == 0) return Windows::kEmpty;
      return ratio_[x] == 1 && reads_map() ? Windows::kWhole : Windows::kOther;
    };
    runs_.clear();
    for (int64_t begin = 0, end; begin < p_.out_width; begin = end) {
      Windows kind = kind_of(begin);
      for (end = begin + 1; end < p_.out_width && kind_of(end) == kind;) ++end;
      if (kind == Windows::kWhole && end - begin < kFewWhole) kind = Windows::kOther;
      if (!runs_.empty() && runs_.back().kind == kind) {
        runs_.back().end = end;
      } else {
        runs_.push_back({begin, end, kind});
      }
    }
  }

  // Of the windows from `begin` on.
  Finish finish_of(int64_t begin) const {
    return {ratio_.data() + begin * (by_channel() ? plan_.pitch : 1), by_channel(), bias_.data(),
            static_cast<float>(p_.negative_slope)};
  }

  // Where a pixel's sums go: to their place in the map if it holds them as they are, else to row_.
  struct Row {
    float* data;
    int64_t step, lanes;
  };
  static bool in_place(const FeatureMap<T>& map, int64_t channels) {
    return std::is_same_v<T, float> && map.channels_last && channels % kDepthwiseLanes == 0;
  }
  Row row_at(const FeatureMap<T>& map, const PixelRow& at, int64_t x) {
    if constexpr (std::is_same_v<T, float>) {
      if (in_place(map, at.channels)) {
        float* data = const_cast<float*>(map.data) + place(map, at) + x * map.channels;
        return {data, map.channels, at.channels};
      }
    }
    return {row_.data() + x * plan_.pitch, plan_.pitch, plan_.pitch};
  }
  static void clear(const Row& row, int64_t count) {
    for (int64_t x = 0; x < count; ++x) std::fill_n(row.data + x * row.step, row.lanes, 0.0f);
  }

  // All taps of the first window of a run of row y.
  void list_taps(const Band& band, int64_t y, const Run& run) {
    list_.clear();
    for (int64_t order = 0; order < plan_.orders; ++order) {
      for (int64_t i = 0; i < p_.kernel[0]; ++i) {
        const int64_t at = y * p_.stride[0] + i * p_.dilation[0];
        const float* row = run.kind == Windows::kWhole ? row_of_input(band, at - p_.padding[0])
                                                       : source_row(at, order);
        row += run.begin * p_.stride[1] * plan_.pitch;
        for (int64_t j = 0; j < p_.kernel[1]; ++j) {
          list_.push_back({row + j * p_.dilation[1] * plan_.pitch, weight_of(order, i, j)});
        }
      }
    }
  }
  // From the padding's first column on, as source_row().
  const float* row_of_input(const Band& band, int64_t y) const {
    if constexpr (std::is_same_v<T, float>) {
      const FeatureMap<T> map = input_map(p_.input);
      return map.data + place(map, pixels(band, y, 0)) - p_.padding[1] * plan_.pitch;
    }
    return nullptr;  // see reads_map()
  }
  const float* weight_of(int64_t order, int64_t i, int64_t j) const {
    return weight_.data() + (order * places_ + i * p_.kernel[1] + j) * plan_.pitch;
  }

  // Over the taps that are listed.
  void sum(TapSum work) const {
    const int64_t taps = list_.size();
    const Finish* finish = work.finish;
    for (int64_t t = 0; t < taps; t += kDepthwiseTaps) {
      work.taps = list_.data() + t;
      work.finish = t + kDepthwiseTaps < taps ? nullptr : finish;
      loops_.sum(std::min<int64_t>(kDepthwiseTaps, taps - t), work);
      work.add = true;
    }
  }

  // Of the plain convolution's result; behind the activation summed to `bias`.
  void load_gradient(const Band& band, int64_t y, float* grad, float* bias) {
    const PixelRow at = pixels(band, y, p_.out_width);
    load_row(output_map(p_.grad_output), at, grad);
    if (p_.result) load_row(output_map(p_.result), at, result_.data());
    loops_.scale(finish_of(0), p_.out_width, plan_.pitch, p_.result ? result_.data() : nullptr,
                 grad, bias);
    for (int64_t order = 1; p_.grad_input && order < plan_.orders; ++order) {
      loops_.reorder(order, grad, p_.out_width * plan_.pitch, grad_row(y, order));
    }
  }

  void add_gradients(const Band& band, int64_t y, const float* grad, float* sums) {
    const int64_t step = p_.stride[1] * plan_.pitch;
    for (const Run& run : runs_) {
      if (run.kind == Windows::kEmpty) continue;
      list_taps(band, y, run);
      for (int64_t t = 0; t < taps_; t += kDepthwiseTaps) {
        loops_.gradient(std::min<int64_t>(kDepthwiseTaps, taps_ - t),
                        {list_.data() + t, run.end - run.begin, plan_.pitch, step,
                         grad + run.begin * plan_.pitch, sums + t * plan_.pitch});
      }
    }
  }

  // The rows of the input that row y of windows is the last to see.
  void store_input_gradients(const Band& band, int64_t y) {
    const int64_t begin = y == 0 ? 0 : input_row(y);
    const int64_t end = y + 1 == p_.out_height ? p_.in_height : input_row(y + 1);
    for (int64_t row = begin; row < end; ++row) {
      sum_gradients(row);
      const PixelRow at = pixels(band, row, p_.in_width);
      mask_pixels(p_, at, plan_.pitch, row_.data());
      store_row(input_map(p_.grad_input), at);
    }
  }

  // The gradient of row y of the input. Pixels that the same columns of the window see, every
  // stride-th, are summed together.
  void sum_gradients(int64_t y) {
    const int64_t stride = p_.stride[1], padding = p_.padding[1];
    for (int64_t phase = 0; phase < stride; ++phase) {
      const int64_t begin = ceil_div(std::max<int64_t>(0, padding - phase), stride);
      const int64_t last = p_.in_width - 1 + padding - phase;
      if (last < begin * stride) continue;
      list_.clear();
      for (int64_t i = 0; i < p_.kernel[0]; ++i) {
        const int64_t from = y + p_.padding[0] - i * p_.dilation[0];
        if (from < 0 || from % p_.stride[0] != 0 || from / p_.stride[0] >= p_.out_height) continue;
        for (int64_t j = 0; j < p_.kernel[1]; ++j) {
          const int64_t back = j * p_.dilation[1] - phase;
          if (back % stride != 0) continue;
          for (int64_t order = 0; order < plan_.orders; ++order) {
            const float* grad = grad_row(from / p_.stride[0], order);
            list_.push_back({grad + (begin - back / stride) * plan_.pitch, weight_of(order, i, j)});
          }
        }
      }
      const int64_t count = last / stride - begin + 1;
      float* to = row_.data() + (begin * stride + phase - padding) * plan_.pitch;
      const int64_t step = stride * plan_.pitch;
      for (int64_t x = 0; list_.empty() && x < count; ++x) {
        std::fill_n(to + x * step, plan_.pitch, 0.0f);
      }
      sum({nullptr, count, plan_.pitch, plan_.pitch, plan_.pitch, step, to, false, nullptr});
    }
  }

  void widen_row(const T* from, int64_t count, float* to) const {
    if constexpr (std::is_same_v<T, float>) std::copy_n(from, count, to);
    if constexpr (std::is_same_v<T, Half>) loops_.widen_half(from, count, to);
    if constexpr (std::is_same_v<T, BFloat16>) loops_.widen_bfloat16(from, count, to);
  }
  void narrow_row(const float* from, int64_t count, T* to) const {
    if constexpr (std::is_same_v<T, float>) std::copy_n(from, count, to);
    if constexpr (std::is_same_v<T, Half>) loops_.narrow_half(from, count, to);
    if constexpr (std::is_same_v<T, BFloat16>) loops_.narrow_bfloat16(from, count, to);
  }

  static int64_t place(const FeatureMap<T>& map, const PixelRow& at) {
    const int64_t plane = map.height * map.width, pixel = at.y * map.width + at.x;
    return map.channels_last ? (at.image * plane + pixel) * map.channels + at.first
                             : (at.image * map.channels + at.first) * plane + pixel;
  }

  // The block's channels of a row of pixels, zeros in the lanes behind them.
  void load_row(const FeatureMap<T>& map, const PixelRow& at, float* to) {
    if (std::is_same_v<T, float> && !map.channels_last) {
      return copy_pixels(map, at, plan_.pitch, to);
    }
    const T* from = map.data + place(map, at);
    if constexpr (std::is_same_v<T, float>) {
      if (in_place(map, at.channels)) {
        return loops_.move({from, to, at.count, at.channels, map.channels, plan_.pitch});
      }
    }
    if (map.channels_last) {
      for (int64_t x = 0; x < at.count; ++x) {
        widen_row(from + x * map.channels, at.channels, to + x * plan_.pitch);
        for (int64_t c = at.channels; c < plan_.pitch; ++c) to[x * plan_.pitch + c] = 0;
      }
      return;
    }
    for (int64_t c = 0; c < at.channels; ++c) {
      widen_row(from + c * map.height * map.width, at.count, turned_.data() + c * at.count);
    }
    transpose(turned_.data(), at.count, at.channels, at.count, to, plan_.pitch);
  }

  void store_row(const FeatureMap<T>& map, const PixelRow& at) {
    T* to = const_cast<T*>(map.data) + place(map, at);
    const int64_t plane = map.height * map.width;
    if constexpr (std::is_same_v<T, float>) {
      if (in_place(map, at.channels)) {
        return loops_.move({row_.data(), to, at.count, at.channels, plan_.pitch, map.channels});
      }
    }
    if (map.channels_last) {
      for (int64_t x = 0; x < at.count; ++x) {
        narrow_row(row_.data() + x * plan_.pitch, at.channels, to + x * map.channels);
      }
    } else if constexpr (std::is_same_v<T, float>) {
      transpose(row_.data(), plan_.pitch, at.count, at.channels, to, plane);
    } else {
      transpose(row_.data(), plan_.pitch, at.count, at.channels, turned_.data(), at.count);
      for (int64_t c = 0; c < at.channels; ++c) {
        narrow_row(turned_.data() + c * at.count, at.count, to + c * plane);
      }
    }
  }

  const PartialConvBackwardParams& p_;
  const Plan& plan_;
  const DepthwiseLoops& loops_;
  WindowCounts counts_;
  int64_t places_;             // of the window
  int64_t taps_;               // (orders, places)
  std::vector<float> source_;  // (source_height, orders, source_width, pitch)
  std::vector<float> grad_;    // (grad_above + 1, orders, grad_width, pitch), scaled
  std::vector<float> ratio_, weight_, bias_;
  std::vector<float> row_, turned_, result_;
  std::vector<uint8_t> loaded_;  // (source_height, column_parts): where the input is read in place
  std::vector<Run> runs_;        // of the row of windows
  std::vector<DepthwiseTap> list_;
};

// The sums of all units, those of a channel always in the same order.
template <typename T>
void store_gradients(const PartialConvBackwardParams& p, const Plan& plan,
                     const std::vector<float>& sums, int64_t begin, int64_t end) {
  const int64_t places = p.kernel[0] * p.kernel[1], taps = plan.orders * places;
  T* grad_weight = static_cast<T*>(p.grad_weight);
  T* grad_bias = static_cast<T*>(p.grad_bias);
  for (int64_t c = begin; c < end; ++c) {
    for (int64_t t = 0; t <= taps; ++t) {
      double sum = 0;
      for (int64_t n = 0; n < p.batch; ++n) {
        for (int64_t band = 0; band < plan.bands; ++band) {
          const int64_t unit = (n * plan.blocks + c / plan.pitch) * plan.bands + band;
          sum += sums[(unit * (taps + 1) + t) * plan.pitch + c % plan.pitch];
        }
      }
      const T value = narrow<T>(static_cast<float>(sum));
      if (t == taps) {
        if (grad_bias) grad_bias[c] = value;
      } else if (grad_weight) {
        grad_weight[weight_place(p, c, c ^ t / places, t % places)] = value;
      }
    }
  }
}

template <typename T>
void forward(const PartialConvBackwardParams& p, const ParallelFor& parallel) {
  const Plan plan(p, /*backward=*/false);
  parallel(p.batch * plan.blocks * plan.bands, [&](int64_t begin, int64_t end) {
    Worker<T> worker(p, plan, /*backward=*/false);
    for (int64_t unit = begin; unit < end; ++unit) worker.forward(unit);
  });
}

template <typename T>
void backward(const PartialConvBackwardParams& p, const ParallelFor& parallel) {
  const Plan plan(p, /*backward=*/true);
  const int64_t units = p.batch * plan.blocks * plan.bands;
  const int64_t size = (plan.orders * p.kernel[0] * p.kernel[1] + 1) * plan.pitch;
  std::vector<float> sums(units * size);
  parallel(units, [&](int64_t begin, int64_t end) {
    Worker<T> worker(p, plan, /*backward=*/true);
    for (int64_t unit = begin; unit < end; ++unit) {
      worker.backward(unit, sums.data() + unit * size);
    }
  });
  parallel(p.in_channels,
           [&](int64_t begin, int64_t end) { store_gradients<T>(p, plan, sums, begin, end); });
}

template <typename Body>
void dispatch_narrow(ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::kFloat32:
      return body(TypeTag<float>{});
    case ScalarType::kFloat16:
      return body(TypeTag<Half>{});
    case ScalarType::kBFloat16:
      return body(TypeTag<BFloat16>{});
    case ScalarType::kFloat64:
      return;
  }
}

}  // namespace

bool has_depthwise(const PartialConvParams& p) {
  const int64_t channels = p.in_channels / p.groups;
  return p.dtype != ScalarType::kFloat64 && p.groups > 1 && p.in_channels == p.out_channels &&
         (channels == 1 || channels == 2 || channels == kDepthwiseOrders);
}

void depthwise_forward_cpu(const PartialConvBackwardParams& params, const ParallelFor& parallel) {
  dispatch_narrow(params.dtype,
                  [&](auto tag) { forward<typename decltype(tag)::type>(params, parallel); });
}

void depthwise_backward_cpu(const PartialConvBackwardParams& params, const ParallelFor& parallel) {
  dispatch_narrow(params.dtype,
                  [&](auto tag) { backward<typename decltype(tag)::type>(params, parallel); });
}

}  // namespace glance
