// Grids of patches whose origins are every pair of some first rows and some first columns: the
// usual case of aggregate_patch_scores (patch_scores.h has the equations), in two passes along one
// axis each instead of one over all patches of a pixel.
//
//   window:  map = R S C^T, where S (gh, gw) are the scores of an image, and R (H, gh), C (W, gw)
//            have the patches' weights along an axis in each pixel, which add up to 1. A pixel is
//            under a run of neighbouring patches, so that R and C are bands.
//   max:     the same with the largest of the band instead of the sum
//   idw:     the weight depends on the distances along the rows and columns alone: a table of them
//            serves all pixels, patches and images
//
// - First along the columns, giving (gh, W), then along the rows. Every sum is taken over its own
//   band, in the order of the patches: a NaN stays in its patch, and nothing drifts as running sums
//   do.
// - Backward is the transpose: first along the rows, then along the columns. A pixel's largest is
// in
//   the first patch row that has it, and there in the first column: the first of all in the order
//   of the patches.
#pragma once

#include <cstdint>

#include "common/scalar.h"
#include "patch_scores/patch_scores.h"

namespace glance {

// The patches along one axis, of which `starts` are the first pixels, ascending.
struct PatchAxis {
  int64_t size = 0;                  // H or W: pixels
  int64_t patch = 0;                 // ph or pw
  int64_t count = 0;                 // gh or gw: patches
  const int32_t* starts = nullptr;   // (count)
  const int32_t* first = nullptr;    // (size): the first patch over each pixel
  const int32_t* last = nullptr;     // (size): one behind the last patch over it
  const int32_t* repeats = nullptr;  // (size): 1 where all is as in the pixel before
  const void* weight = nullptr;      // (count, patch): of a patch in its pixels; accumulate type
};

struct PatchGridParams {
  ScalarType dtype = ScalarType::kFloat32;
  PatchMode mode = PatchMode::kWindow;
  int64_t batch = 0;  // N
  PatchAxis rows, columns;
  const void* scores = nullptr;  // (N, gh, gw)
  void* map = nullptr;           // (N, H, W)
  void* spread = nullptr;        // (N, gh, W): workspace of CUDA but for idw; accumulate type

  // idw: the weight at a distance, by twice the rows' distance / 2 and the columns' + table_origin.
  const void* table = nullptr;  // (rows' distances, table_pitch); accumulate type
  int64_t table_pitch = 0;
  int64_t table_origin = 0;
  const void* total = nullptr;  // (H, W) sum of a pixel's weights, or null for the plain sum
};

struct PatchGridBackwardParams : PatchGridParams {
  const void* grad_map = nullptr;  // (N, H, W)
  void* grad_scores = nullptr;     // (N, gh, gw)
  int32_t* best = nullptr;         // max: (N, H, W) workspace, the patch row that a pixel took
  int32_t* best_column = nullptr;  // max on CUDA: (N, gh, W) workspace, the same for columns
  void* share = nullptr;           // idw: (N, H, share_pitch) workspace, grad_map / total
  int64_t share_pitch = 0;         // W rounded up to kGridPad
};

// Zeros behind each row of `share`, and numbers behind each row of `table`, that a vector may read.
constexpr int64_t kGridPad = 32;

// Where the table has the rows' distance between pixel y and the centre of a patch at `start`.
GLANCE_HOST_DEVICE inline int64_t distance_index(int64_t y, int64_t start, int64_t patch) {
  const int64_t twice = 2 * (y - start) - (patch - 1);
  return (twice < 0 ? -twice : twice) / 2;
}

// CPU kernels work on a range, so that the caller owns the threads.
void aggregate_grid_cpu(const PatchGridParams& params, int64_t begin, int64_t end);  // N * H rows
void aggregate_idw_grid_cpu(const PatchGridParams& params, int64_t begin, int64_t end);  // H rows
// First pass of max (fills `best`) and of idw (fills `share`), over N * H rows; window has none.
void aggregate_grid_prepare_cpu(const PatchGridBackwardParams& params, int64_t begin, int64_t end);
void aggregate_idw_grid_prepare_cpu(const PatchGridBackwardParams& params, int64_t begin,
                                    int64_t end);
// Second pass, over N * gh patch rows; for idw over gh * gw patches.
void aggregate_grid_backward_cpu(const PatchGridBackwardParams& params, int64_t begin, int64_t end);
void aggregate_idw_grid_backward_cpu(const PatchGridBackwardParams& params, int64_t begin,
                                     int64_t end);

// CUDA launchers: asynchronous on `stream` (a cudaStream_t), returning a cudaError_t as an int.
int aggregate_grid_cuda(const PatchGridParams& params, void* stream);
int aggregate_grid_backward_cuda(const PatchGridBackwardParams& params, void* stream);

}  // namespace glance
