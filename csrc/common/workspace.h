// Memory for the length of a call, which its thread keeps for the next one: pages that the system
// takes back and hands out again, zeroed, cost more than many kernels do with them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <new>

namespace glance {

// What a thread keeps, newest first.
class WorkspacePool {
 public:
  static constexpr int64_t kMostBytes = 32 * 1024 * 1024;
  static constexpr size_t kMostBlocks = 16;
  static constexpr std::align_val_t kAlignment{64};

  struct Block {
    void* data = nullptr;
    int64_t bytes = 0;
  };

  static WorkspacePool& of_thread() {
    static thread_local WorkspacePool pool;
    return pool;
  }
  WorkspacePool() = default;
  WorkspacePool(const WorkspacePool&) = delete;
  WorkspacePool& operator=(const WorkspacePool&) = delete;
  ~WorkspacePool() {
    for (const Block& block : blocks_) free(block);
  }

  int64_t kept_bytes() const { return kept_; }

  // The smallest block that is large enough, else a new one.
  Block take(int64_t bytes) {
    auto best = blocks_.end();
    for (auto at = blocks_.begin(); at != blocks_.end(); ++at) {
      if (at->bytes >= bytes && (best == blocks_.end() || at->bytes < best->bytes)) best = at;
    }
    if (best == blocks_.end()) return {::operator new(bytes, kAlignment), bytes};
    const Block block = *best;
    kept_ -= block.bytes;
    blocks_.erase(best);
    return block;
  }

  // Keeps it, and drops those that were given back longest ago.
  void give_back(const Block& block) {
    if (block.bytes > kMostBytes) return free(block);
    blocks_.push_front(block);
    kept_ += block.bytes;
    while (kept_ > kMostBytes || blocks_.size() > kMostBlocks) {
      kept_ -= blocks_.back().bytes;
      free(blocks_.back());
      blocks_.pop_back();
    }
  }

 private:
  static void free(const Block& block) { ::operator delete(block.data, kAlignment); }

  std::list<Block> blocks_;
  int64_t kept_ = 0;
};

// `count` elements, not initialised.
template <typename T>
class Workspace {
 public:
  explicit Workspace(int64_t count) : size_(count) {
    if (count > 0) block_ = WorkspacePool::of_thread().take(count * int64_t(sizeof(T)));
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (block_.data) WorkspacePool::of_thread().give_back(block_);
  }

  T* data() const { return static_cast<T*>(block_.data); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data()[i]; }

 private:
  WorkspacePool::Block block_;
  int64_t size_;
};

}  // namespace glance
