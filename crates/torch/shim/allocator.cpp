// A host allocator for libtorch that keeps its memory.
//
// libtorch's own goes to malloc, which maps and unmaps a large tensor each time: every gradient would be page-faulted and
// zeroed by the kernel in every step. This one carves large blocks out of segments of address space, best fit first, joins
// neighbours when they are freed, and gives nothing back: a step in steady state maps nothing. Address space that was never
// handed out costs no memory; pages are huge where the system allows it.
//
//   segment: | block, in use | block, free | block, in use | block, free: the rest, mostly never touched |
#include "shim.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <mutex>
#include <new>
#include <set>

namespace {

constexpr size_t kAlignment = 64;          // also the size of a block's header
constexpr size_t kLargeBytes = 256 << 10;  // smaller requests are malloc's
constexpr size_t kPageBytes = 4 << 10;
constexpr size_t kHugePageBytes = 2 << 20;
constexpr size_t kSegmentBytes = size_t{1} << 30;

struct alignas(kAlignment) Block {
  size_t bytes;   // with this header; 0: malloc's
  Block* before;  // neighbours in the segment, in address order
  Block* after;
  bool free;
  char* data() { return reinterpret_cast<char*>(this + 1); }
};
static_assert(sizeof(Block) == kAlignment);

struct BySize {
  bool operator()(const Block* a, const Block* b) const { return a->bytes != b->bytes ? a->bytes < b->bytes : a < b; }
};

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

class KeepingAllocator final : public c10::Allocator {
 public:
  at::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, at::Device(at::DeviceType::CPU)};
    void* data = bytes < kLargeBytes ? small(bytes) : large(bytes);
    return {data, data, &release, at::Device(at::DeviceType::CPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* dest, const void* src, size_t count) const override { default_copy_data(dest, src, count); }

  SwMemoryStats stats() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {live_, touched_ - live_, peak_, segments_};
  }
  void reset_peak() {
    std::lock_guard<std::mutex> lock(mutex_);
    peak_ = live_;
  }
  // Gives the pages of free blocks back to the system; the address space stays.
  void release_cached() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (Block* block : free_) {
      const size_t begin = round_up(reinterpret_cast<size_t>(block->data()), kPageBytes);
      const size_t end = (reinterpret_cast<size_t>(block) + block->bytes) / kPageBytes * kPageBytes;
      if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
    }
    touched_ = live_;
  }
  static KeepingAllocator& instance() {
    static auto* allocator = new KeepingAllocator();  // never destroyed: tensors may outlive main
    return *allocator;
  }

 private:
  static void* small(size_t bytes) {
    void* raw = nullptr;
    if (posix_memalign(&raw, kAlignment, bytes + sizeof(Block)) != 0) out_of_memory(bytes);
    return (new (raw) Block{0, nullptr, nullptr, false})->data();
  }

  void* large(size_t bytes) {
    const size_t wanted = round_up(bytes + sizeof(Block), kPageBytes);
    std::lock_guard<std::mutex> lock(mutex_);
    Block key{wanted, nullptr, nullptr, true};
    auto found = free_.lower_bound(&key);
    // The key's address may be above that of a block of just the right size.
    if (found != free_.begin() && (*std::prev(found))->bytes == wanted) --found;
    Block* block = found != free_.end() ? *found : nullptr;
    if (block) {
      free_.erase(found);
    } else {
      block = map_segment(wanted);
    }
    if (block->bytes - wanted >= kLargeBytes) split(block, wanted);
    block->free = false;
    live_ += block->bytes;
    peak_ = std::max(peak_, live_);
    touched_ = std::max(touched_, live_);
    return block->data();
  }

  // Leaves `bytes` of a block to its owner and frees the rest.
  void split(Block* block, size_t bytes) {
    Block* rest = new (reinterpret_cast<char*>(block) + bytes) Block{block->bytes - bytes, block, block->after, true};
    if (rest->after) rest->after->before = rest;
    block->after = rest;
    block->bytes = bytes;
    free_.insert(rest);
  }

  Block* map_segment(size_t wanted) {
    const size_t bytes = std::max(round_up(wanted, kHugePageBytes), kSegmentBytes);
    void* raw = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) out_of_memory(wanted);
    madvise(raw, bytes, MADV_HUGEPAGE);
    ++segments_;
    return new (raw) Block{bytes, nullptr, nullptr, false};
  }

  static void release(void* data) {
    if (!data) return;
    Block* block = static_cast<Block*>(data) - 1;
    if (block->bytes == 0) {
      free(block);
    } else {
      instance().give_back(block);
    }
  }

  void give_back(Block* block) {
    std::lock_guard<std::mutex> lock(mutex_);
    live_ -= block->bytes;
    block->free = true;
    if (block->after && block->after->free) join(block, block->after);
    if (block->before && block->before->free) {
      Block* before = block->before;
      free_.erase(before);
      join_into(before, block);
      block = before;
    }
    free_.insert(block);
  }

  // Appends the free neighbour `after` to `block`.
  void join(Block* block, Block* after) {
    free_.erase(after);
    join_into(block, after);
  }

  static void join_into(Block* block, Block* after) {
    block->bytes += after->bytes;
    block->after = after->after;
    if (block->after) block->after->before = block;
  }

  [[noreturn]] static void out_of_memory(size_t bytes) {
    TORCH_CHECK(false, "could not allocate ", bytes, " bytes of host memory");
    std::abort();
  }

  std::mutex mutex_;
  std::set<Block*, BySize> free_;
  size_t live_ = 0, peak_ = 0, touched_ = 0, segments_ = 0;
};

}  // namespace

extern "C" {
void sw_install_allocator() { c10::SetCPUAllocator(&KeepingAllocator::instance(), /*priority=*/1); }
SwMemoryStats sw_memory_stats() { return KeepingAllocator::instance().stats(); }
void sw_reset_peak() { KeepingAllocator::instance().reset_peak(); }
void sw_release_cached() { KeepingAllocator::instance().release_cached(); }
}
