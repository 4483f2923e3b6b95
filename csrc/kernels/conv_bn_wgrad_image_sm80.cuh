// conv_bn_wgrad of an image of a few channels, for sm_80 and later: the gradient of the first
// layer's weights, by rows of the image.
//
//     dweight[k, r, s, c] = sum over output pixels of dy[m, k] * x[pixel of m's tap (r, s), c]
//     dy = a dz + (b y + c)
//
// M: output channels, N: rows of taps, taps, channels, reduction: steps of 32 output pixels of one
// row. Every block leaves its sums in a workspace, as conv_bn_wgrad's do.
#pragma once

#include "../device/image_wgrad_loader.h"
#include "../device/resident_blocks.h"
#include "../device/wgrad_parts.h"

namespace resnet_fused {

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, kResidentBlocks<Shape>)
    conv_bn_wgrad_image_kernel(const __grid_constant__ ConvBnWgradArguments arguments) {
  const ConvWgradArguments& product = arguments.product;
  const ptx::SharedAddress ring = ptx::shared_address(ptx::dynamic_shared());
  const auto place = Place<Shape>::mine();
  const Tile tile = tile_of(blockIdx.x, product.tiles);
  const WgradPart part = wgrad_part<T, Shape>(product, tile);
  ImageWgradLoader<T, Shape> loader(arguments, tile, part.first_pixel, place.thread);
  const MnMajorFragments<T, Side::kLeft, Shape::kBlocksM, Shape::kM> left(place.row, place.lane);
  const ImageFragments<Shape> right(ring, place.column, place.lane);
  loader.begin(ring);
  Sums<Shape> sums;
  sums.clear();
  run_main_loop<T>(sums, ring, part.steps, left, right, loader, [](int) {});
  leave_wgrad_sums(sums, product, tile, place.thread);
}

}  // namespace resnet_fused
