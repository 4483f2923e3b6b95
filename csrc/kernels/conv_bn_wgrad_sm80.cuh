// conv_bn_wgrad on the GPU, for sm_80 and later: the gradient of a convolution's weights between
// two BatchNorms, both of whose backwards and forwards are made as operands arrive.
//
//     dweight[k, e] = sum over m of dy[m, k] * h[m, e]
//     dy = a dz + (b y + c),  h = relu(scale x + shift), of pixels that lie in the image
//
// M: output channels of a group, N: its taps and input channels, reduction: output pixels of the
// batch. Every block leaves its sums in a workspace: the parameter they are for may be float beside
// operands of 16 bits, and such a tile would not fit into the ring.
#pragma once

#include "../device/bn_wgrad_loader.h"
#include "../device/halo_wgrad_loader.h"
#include "../device/resident_blocks.h"
#include "../device/wgrad_parts.h"

namespace resnet_fused {

template <class T, class Shape, LoadWidth kWidth>
__global__ void __launch_bounds__(Shape::kThreads, kResidentBlocks<Shape>)
    conv_bn_wgrad_kernel(const __grid_constant__ ConvBnWgradArguments arguments) {
  const ConvWgradArguments& product = arguments.product;
  const ptx::SharedAddress ring = ptx::shared_address(ptx::dynamic_shared());
  const auto place = Place<Shape>::mine();
  const Tile tile = tile_of(blockIdx.x, product.tiles);
  const WgradPart part = wgrad_part<T, Shape>(product, tile);
  Sums<Shape> sums;
  sums.clear();
  if constexpr (kWindowsOf<Shape> > 0) {
    HaloWgradLoader<T, Shape> loader(arguments, tile, part.first_pixel, ring + Shape::kRingBytes,
                                     place);
    const MnMajorFragments<T, Side::kLeft, Shape::kBlocksM, Shape::kM> left(place.row, place.lane);
    const HaloTapFragments<HaloWgradLoader<T, Shape>> right{loader};
    loader.begin();
    run_main_loop<T>(sums, ring, part.steps, left, right, loader, [](int) {});
  } else {
    BnWgradLoader<T, Shape, kWidth> loader(arguments, tile, part.first_pixel, place.thread);
    add_wgrad_products<T>(sums, loader, part.steps, ring, place);
  }
  leave_wgrad_sums(sums, product, tile, place.thread);
}

}  // namespace resnet_fused
