// Which path a CUDA call takes: a model of what both cost. Not yet measured on a GPU, and meant to
// err on the library's side.
//
// A cost is in bytes of memory that could be moved meanwhile. With In and Out the bytes of input
// and output, and F the operations of the products:
//
//   library, output       2 In (masked copy) + max(In + Out, F / R) + 2 Out (rescaling)
//   library, grad_input   max(In + Out, F / R) + 2 In (masking)
//   fused, either         max(In + Out, F / r)
//
// R is what a library's kernel multiplies in the time of a byte: on an A100 four fifths of 312
// TFLOP/s at 1.55 TB/s, about 160 in 16 bits and half of that as TF32; on an H100 about 200. r is
// what we expect of ours: two fifths of R, since mma reaches about 60 % of what wgmma does on
// Hopper, and since nobody has tuned it yet. Where there are fewer tiles than multiprocessors, the
// others idle, while libraries split the depth. So the fused path serves layers that are bound by
// memory: few channels, small windows.
//
// On the plain path (float32 without TF32, float64) both are bound by arithmetic, which libraries
// do well. Of depthwise convolutions, bound by memory in either path, the fused moves a third.
// Contiguous tensors would have to be transposed for it and back, which costs what it saves.
#include <algorithm>

#include "partial_conv/fused_tile.h"

namespace glance {
namespace {

constexpr double kLibraryRate = 160, kOurRate = 64;  // R and r, in 16 bits
constexpr int64_t kMultiprocessors = 132;
constexpr int64_t kDepthwiseTaps = 25;  // beyond, arithmetic weighs more than memory

template <typename Tile>
bool is_cheaper(const PartialConvBackwardParams& p, Sweep sweep) {
  if (!fits_slide_tile<Tile>(p, sweep)) return false;
  const SlideWork w = slide_work<Tile>(p, sweep);
  const double size = sizeof(typename Tile::T), rate = size == 4 ? 0.5 : 1;
  const double in = size * p.batch * p.in_channels * p.in_height * p.in_width;
  const double out = size * p.batch * p.out_channels * p.out_height * p.out_width;
  const double operations = 2.0 * p.batch * p.out_height * p.out_width * p.out_channels *
                            (p.in_channels / p.groups) * w.taps;
  const double idle = std::max(1.0, static_cast<double>(kMultiprocessors) / w.blocks);
  const double copy =
      w.channels == w.weight_channels ? 0 : 2 * size * w.source_count() * w.channels;
  const double library = std::max(in + out, operations / (kLibraryRate * rate)) +
                         (sweep == Sweep::kForward ? 2 * in + 2 * out : 2 * in);
  const double fused = copy + std::max(in + out, operations / (kOurRate * rate) * idle);
  return fused < library;
}

}  // namespace

bool prefers_fused_cuda(const PartialConvBackwardParams& p, Sweep sweep) {
  if (!fits_slide(p) || p.dtype == ScalarType::kFloat64) return false;
  if (is_depthwise(p)) {
    const int64_t vector = p.dtype == ScalarType::kFloat32 ? 4 : 8;
    return p.in_channels % vector == 0 && p.kernel[0] * p.kernel[1] <= kDepthwiseTaps;
  }
  if (p.dtype == ScalarType::kFloat32 && !p.tf32) return false;
  bool cheaper = false;
  dispatch_slide_tile(
      p, sweep, [&](auto tag) { cheaper = is_cheaper<typename decltype(tag)::type>(p, sweep); });
  return cheaper;
}

}  // namespace glance
