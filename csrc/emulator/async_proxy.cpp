#include "async_proxy.h"

#include <string>

#include "block.h"
#include "sanitizers.h"

namespace resnet_fused::emulator {

void proxy_fence(Site) {
  const Quiet quiet;
  FiberThread& thread = self();
  thread.block->shared.proxy_fence(thread);
}

uint32_t AsyncRead::bytes() const {
  uint32_t total = 0;
  for (const AsyncPiece& piece : pieces_) total += piece.bytes;
  return total;
}

void AsyncRead::values(uint8_t* to) const {
  const Quiet quiet;
  for (const AsyncPiece& piece : pieces_) {
    block_->shared.async_view(*block_, issuers_, piece.address - kSharedBase, piece.bytes, to);
    to += piece.bytes;
  }
}

void AsyncRead::waited() const {
  const Quiet quiet;
  const int column = block_->shared.column(self().warp);
  block_->shared.readers().waited(number_, column, block_->shared.clocks().epoch(column));
}

AsyncRead async_read(Site site, const char* instruction, Issuers issuers,
                     std::vector<AsyncPiece> pieces) {
  const Quiet quiet;
  Block& block = *self().block;
  AsyncRead read;
  read.block_ = &block;
  read.issuers_ = issuers;
  read.number_ =
      block.shared.readers().begin(issuers, block.grid->session->record_of(site, instruction).id);
  const std::vector<uint32_t> known = block.shared.known_to(block, issuers);
  for (const AsyncPiece& piece : pieces) {
    constexpr uint32_t kUnit = AsyncReaders::kGranule;
    if (piece.bytes % kUnit != 0) {
      fail(site, instruction,
           "a piece of " + std::to_string(piece.bytes) + " bytes: expected a multiple of 16");
    }
    block.shared.check_bounds(site, instruction, piece.address, piece.bytes, kUnit);
    if (piece.bytes == 0) continue;
    const uint32_t offset = piece.address - kSharedBase;
    block.shared.async_read(site, instruction, block, issuers, known, offset, piece.bytes);
    block.shared.readers().add(read.number_, offset, piece.bytes);
  }
  read.pieces_ = std::move(pieces);
  return read;
}

}  // namespace resnet_fused::emulator
