// Hole windows: what a hole changes in a network's features, and nothing else.
//
// A network sees an image once as it is (the base pass) and once for each of many holes, in which
// pixels are missing. At every layer a hole changes the features only in a window; everywhere else
// they are those of the base pass. So one step of the shared computation is, for hole b of image n,
//
//   input(y, x) = 0                                     outside the map (padding)
//                 windows[b, y - r, x - c]              inside the hole's extent (r, c, h, w)
//                 base[n, y, x]                         elsewhere
//   output[b, i, j] = act(ratio[b, i, j] * sum_t weight_t . input(y_t, x_t) + bias)
//                     with y_t = (origin_r + i) * stride - padding + dilation * t_y, x_t alike
//
// for the cells (i, j) of the next window that the hole reaches and where ratio is not 0; all other
// cells of the output are exactly 0. `ratio` is partial convolution's sum(1) / sum(M) (csrc/
// partial_conv/partial_conv.h), or 1 in a plain convolution. Without `windows` the extent is the
// hole itself: its pixels are missing and count as 0. act is LeakyReLU: slope 0 is ReLU, 1 nothing.
//
// - Geometry (extents, origins, ratios, cells) depends on the holes alone, not on the pixels: a row
//   of it serves window b of image n as row b % rows, with one row a hole for holes that all images
//   share, or one a window.
// - A value inside the extent never touches the base: NaN and infinity behind a hole do not leak.
// - Sums in float (double for double); bfloat16 products are exact, two at a time, where the
//   processor has such instructions. Every output is written by one thread: no atomics.
// - Layout: channels last throughout, so that a window's row of cells is one run of memory.
#pragma once

#include <cstdint>

#include "common/parallel_for.h"
#include "common/scalar.h"

namespace glance {

struct HoleWindowsParams {
  ScalarType dtype = ScalarType::kFloat32;

  int64_t batch = 0;          // N
  int64_t holes = 0;          // P of each image; window b belongs to image b / P
  int64_t geometry_rows = 0;  // G: P, or N * P
  int64_t channels = 0;       // C
  int64_t height = 0;         // H
  int64_t width = 0;          // W
  int64_t window_height = 0;  // h
  int64_t window_width = 0;   // w

  const int32_t* extents = nullptr;  // (G, 4): row, column, rows, columns
  const void* base = nullptr;        // (N, H, W, C)
  const void* windows = nullptr;     // (N * P, h, w, C), or null: the extent is the hole itself

  // A caller that keeps the windows of a few holes only says which is the first in memory.
  int64_t first_window = 0;
  int64_t first_output = 0;

  GLANCE_HOST_DEVICE int64_t window_count() const { return batch * holes; }
};

// Tiles cut out of the composed input: tile b begins at origins[b], which may lie outside the map.
struct HoleGatherParams : HoleWindowsParams {
  int64_t tile_height = 0;           // th
  int64_t tile_width = 0;            // tw
  double fill = 0;                   // outside the map
  const int32_t* origins = nullptr;  // (G, 2): row, column
  void* tiles = nullptr;             // (N * P, th, tw, C)
};

struct HoleGatherBackwardParams : HoleGatherParams {
  const void* grad_tiles = nullptr;  // (N * P, th, tw, C)
  void* grad_base = nullptr;         // (N, H, W, C), sums in the order of the holes; or null
  void* grad_windows = nullptr;      // (N * P, h, w, C); or null
};

struct HoleConvParams : HoleWindowsParams {
  int64_t out_channels = 0;  // K
  int64_t out_height = 0;    // ho, of the next window
  int64_t out_width = 0;     // wo
  int64_t kernel[2] = {1, 1};
  int64_t stride[2] = {1, 1};
  int64_t padding[2] = {0, 0};
  int64_t dilation[2] = {1, 1};
  double negative_slope = 1;
  bool tf32 = false;       // CUDA may multiply float32 as TF32, which keeps 10 bits of the fraction
  int64_t cell_count = 0;  // M

  const int32_t* origins = nullptr;  // (G, 2): the next window's first row and column
  const int32_t* cells = nullptr;    // (M): where ratio is not 0, flat in (G, ho, wo), ascending
  const void* ratio = nullptr;       // (G, ho, wo), accumulate type
  const void* weight = nullptr;      // (K, C, kh, kw)
  const void* bias = nullptr;        // (K), or null
  void* output = nullptr;            // (N * P, ho, wo, K)
  void* packed = nullptr;  // workspace: packed_weight_bytes(), on CUDA hole_conv_workspace_bytes()
};

struct HoleConvBackwardParams : HoleConvParams {
  const void* grad_output = nullptr;  // (N * P, ho, wo, K)
  const void* result = nullptr;       // (N * P, ho, wo, K): the output, or null without activation
  // Each null where it is not wanted. Of the input's tiles, as HoleGatherParams has them, with
  // origins * stride - padding: cells that no window sees are 0.
  void* grad_tiles = nullptr;   // (N * P, th, tw, C)
  void* grad_weight = nullptr;  // (K, kh, kw, C)
  void* grad_bias = nullptr;    // (K)
};

// The greatest value in each cell's window of the composed input, for every cell of the next
// window; outside of the map nothing counts, and a cell that sees nothing else is -infinity. NaN is
// the greatest of all.
struct HolePoolParams : HoleWindowsParams {
  int64_t out_height = 0;  // ho, of the next window
  int64_t out_width = 0;   // wo
  int64_t kernel[2] = {1, 1};
  int64_t stride[2] = {1, 1};
  int64_t padding[2] = {0, 0};
  int64_t dilation[2] = {1, 1};
  const int32_t* origins = nullptr;  // (G, 2): the next window's first row and column
  void* output = nullptr;            // (N * P, ho, wo, C)
};

// CPU kernels work on a range, so that the caller owns the threads.
void gather_holes_cpu(const HoleGatherParams& params, int64_t begin, int64_t end);  // of N * P
void hole_max_pool_cpu(const HolePoolParams& params, int64_t begin, int64_t end);   // of N * P
// The two halves of the gradient: over N * P windows, and over N * H rows of the base.
void scatter_windows_cpu(const HoleGatherBackwardParams& params, int64_t begin, int64_t end);
void scatter_base_cpu(const HoleGatherBackwardParams& params, int64_t begin, int64_t end);

// The convolution reads weights in the order of its inner loop: pack them first, then convolve.
int64_t packed_weight_bytes(const HoleConvParams& params);
int64_t weight_panels(const HoleConvParams& params);
int64_t channel_padding(const HoleConvParams& params);  // zero channels that would spare copies
void pack_weight_cpu(const HoleConvParams& params, int64_t begin, int64_t end);  // of the panels
void hole_conv_cpu(const HoleConvParams& params, int64_t begin, int64_t end);    // of N * P
// All gradients that have a pointer, in sums of one order whatever the threads; not for float64.
// Reads neither `cells` nor `bias`.
void hole_conv_backward_cpu(const HoleConvBackwardParams& params, const ParallelFor& parallel);

// One layer of a sequence: a convolution, or where it has no weight a max-pooling.
struct HoleLayer {
  HoleConvParams conv;
  HolePoolParams pool;

  bool is_pool() const { return conv.weight == nullptr; }
  const HoleWindowsParams& input() const {
    return is_pool() ? static_cast<const HoleWindowsParams&>(pool) : conv;
  }
  // Of one window, its output's elements.
  int64_t output_size() const {
    return is_pool() ? pool.out_height * pool.out_width * pool.channels
                     : conv.out_height * conv.out_width * conv.out_channels;
  }
};

// Windows [begin, end) of N * P through all `count` layers, a few at a time, so that what lies
// between the layers stays in the cache. Only the last layer's output is memory of the caller.
void hole_sequence_cpu(const HoleLayer* layers, int64_t count, int64_t begin, int64_t end);

// CUDA launchers: asynchronous on `stream` (a cudaStream_t), returning a cudaError_t as an int.
int gather_holes_cuda(const HoleGatherParams& params, void* stream);
int scatter_holes_cuda(const HoleGatherBackwardParams& params, void* stream);  // both halves
int64_t hole_conv_workspace_bytes(const HoleConvParams& params);  // aligned to 16 bytes
int hole_conv_cuda(const HoleConvParams& params, void* stream);   // output is zero before
int hole_max_pool_cuda(const HolePoolParams& params, void* stream);

}  // namespace glance
