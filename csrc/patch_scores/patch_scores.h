// Aggregation of overlapping patches' scores into a map: the contract of this folder's kernels.
// Those here take any list of patches; patch_grid.h has faster ones for grids.
//
// Patch p covers the pixels [r_p, r_p + ph) x [c_p, c_p + pw). A pixel (y, x) of the map is
//
//   window (mean, gaussian):  sum_p w_p s_p / sum_p w_p over the patches that cover it, with
//                             w_p = weight_y[y - r_p] * weight_x[x - c_p], all ones for the mean
//   max:                      the largest s_p over the patches that cover it
//   idw:                      sum_p w_p s_p / sum_p w_p over all patches, w_p = d_p^-power, d_p the
//                             distance from the pixel to the patch's centre; a pixel on centres
//                             takes the mean of the patches centred there
//
// - Every pixel gathers: no atomics, and the order of the sums is the order of the patches, so a
//   result does not depend on threads.
// - Arithmetic in float (double for double). NaN scores reach exactly the pixels that they
//   have a part in: those that the patch covers, or for idw all but those on other patches'
//   centres.
// - idw weights are taken relative to the nearest centre, (d_min / d_p)^power, which neither
//   overflows nor vanishes.
// - Gradients: the modes but max are linear in the scores. max passes a pixel's gradient to the
//   first of the patches that attain it.
// - The caller has checked that patches lie inside the map and (but for idw) cover every pixel.
#pragma once

#include <cstdint>

#include "common/scalar.h"

namespace glance {

enum class PatchMode : int { kWindow, kMax, kIdw };

struct PatchScoresParams {
  ScalarType dtype = ScalarType::kFloat32;
  PatchMode mode = PatchMode::kWindow;

  int64_t batch = 0;         // N
  int64_t patches = 0;       // P
  int64_t height = 0;        // H
  int64_t width = 0;         // W
  int64_t patch_height = 0;  // ph
  int64_t patch_width = 0;   // pw
  double power = 0;          // idw only

  const int64_t* origins = nullptr;      // (P, 2) row, column
  const int64_t* row_begin = nullptr;    // (H + 1): where each row's patches begin in row_patches
  const int64_t* row_patches = nullptr;  // (P * ph): patches over each row, ascending in a row
  const void* weight_y = nullptr;        // (ph), accumulate type
  const void* weight_x = nullptr;        // (pw), accumulate type

  const void* scores = nullptr;  // (N, P)
  void* map = nullptr;           // (N, H, W)
};

struct PatchScoresBackwardParams : PatchScoresParams {
  const void* grad_map = nullptr;  // (N, H, W)
  void* grad_scores = nullptr;     // (N, P)
  // Per-pixel workspace of the first pass, read by the second:
  void* norm = nullptr;     // window: (H, W) sum of weights; idw: (2, H, W) nearest squared
                            // distance, then sum of weights; accumulate type
  int32_t* best = nullptr;  // max: (N, H, W) the patch that a pixel took
};

// CPU kernels work on a range, so that the caller owns the threads.
void aggregate_cpu(const PatchScoresParams& params, int64_t begin, int64_t end);  // of N * H rows
// First pass: fills `norm` over H rows (window, idw) or `best` over N * H rows (max).
void aggregate_prepare_cpu(const PatchScoresBackwardParams& params, int64_t begin, int64_t end);
// Second pass, over P patches.
void aggregate_backward_cpu(const PatchScoresBackwardParams& params, int64_t begin, int64_t end);

// CUDA launchers: asynchronous on `stream` (a cudaStream_t), returning a cudaError_t as an int.
int aggregate_cuda(const PatchScoresParams& params, void* stream);
int aggregate_backward_cuda(const PatchScoresBackwardParams& params, void* stream);  // both passes

}  // namespace glance
