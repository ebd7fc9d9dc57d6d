// A program without torch that uses an installed glance_ext: the kernels' headers and library.
#include <cstdint>
#include <iostream>
#include <vector>

#include "partial_conv/partial_conv.h"

int main() {
  const std::vector<uint8_t> mask{1, 0, 1, 1};  // 2 x 2
  std::vector<float> ratio(1);
  glance::PartialConvParams p;
  p.batch = p.mask_batch = p.mask_channels = 1;
  p.in_height = p.in_width = p.kernel[0] = p.kernel[1] = 2;
  p.out_height = p.out_width = 1;
  p.mask = mask.data();
  p.ratio = ratio.data();
  glance::window_ratio_cpu(p, 0, glance::ratio_rows(p));
  std::cout << ratio[0] << std::endl;
  return ratio[0] == 4.0f / 3 ? 0 : 1;
}
