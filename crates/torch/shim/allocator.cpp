// A host allocator for libtorch that keeps large blocks.
//
// libtorch's own goes to malloc, which maps and unmaps a large tensor each time: every gradient would be page-faulted and
// zeroed by the kernel in every step. This one keeps freed blocks by size class (eight an octave, so at most an eighth of
// address space is wasted and none of it touched) and hands them out again, most recently used first, while they are still
// in cache. It never holds more than the most that was ever live, plus a little slack. Blocks use huge pages.
#include "shim.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <vector>

namespace {

constexpr size_t kAlignment = 64;               // also the size of a block's header
constexpr size_t kLargeBytes = 256 << 10;       // smaller blocks are malloc's
constexpr size_t kHugePageBytes = 2 << 20;
constexpr size_t kSlackBytes = 32 << 20;

struct alignas(kAlignment) Header {
  size_t class_bytes;  // 0: malloc's
  uint64_t freed_at;
};
static_assert(sizeof(Header) == kAlignment);

size_t size_class(size_t bytes) {
  size_t octave = 1;
  while (octave * 2 <= bytes) octave *= 2;
  const size_t step = std::max<size_t>(octave / 8, 4096);
  return (bytes + step - 1) / step * step;
}

class CachingAllocator final : public c10::Allocator {
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
    return {live_, cached_, peak_, mappings_};
  }
  void reset_peak() {
    std::lock_guard<std::mutex> lock(mutex_);
    peak_ = live_;
  }
  void release_cached() {
    std::lock_guard<std::mutex> lock(mutex_);
    evict_until(0);
  }
  static CachingAllocator& instance() {
    static auto* allocator = new CachingAllocator();  // never destroyed: tensors may outlive main
    return *allocator;
  }

 private:
  static void* small(size_t bytes) {
    void* raw = nullptr;
    if (posix_memalign(&raw, kAlignment, bytes + sizeof(Header)) != 0) out_of_memory(bytes);
    new (raw) Header{0, 0};
    return static_cast<char*>(raw) + sizeof(Header);
  }

  void* large(size_t bytes) {
    const size_t class_bytes = size_class(bytes + sizeof(Header));
    std::lock_guard<std::mutex> lock(mutex_);
    live_ += class_bytes;
    peak_ = std::max(peak_, live_);
    auto& free = free_[class_bytes];
    if (!free.empty()) {
      Header* header = free.back();
      free.pop_back();
      cached_ -= class_bytes;
      return header + 1;
    }
    const size_t limit = peak_ + kSlackBytes;
    evict_until(limit > live_ ? limit - live_ : 0);
    void* raw = mmap(nullptr, class_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) {
      live_ -= class_bytes;
      out_of_memory(bytes);
    }
    if (class_bytes >= kHugePageBytes) madvise(raw, class_bytes, MADV_HUGEPAGE);
    ++mappings_;
    return new (raw) Header{class_bytes, 0} + 1;
  }

  static void release(void* data) {
    if (!data) return;
    Header* header = static_cast<Header*>(data) - 1;
    if (header->class_bytes == 0) {
      free(header);
    } else {
      instance().give_back(header);
    }
  }

  void give_back(Header* header) {
    std::lock_guard<std::mutex> lock(mutex_);
    live_ -= header->class_bytes;
    cached_ += header->class_bytes;
    header->freed_at = ++clock_;
    free_[header->class_bytes].push_back(header);
  }

  // Unmaps the blocks that were freed longest ago. Only a miss gets here, so a scan is cheap enough.
  void evict_until(size_t max_cached) {
    while (cached_ > max_cached) {
      std::vector<Header*>* oldest = nullptr;
      for (auto& [bytes, list] : free_)
        if (!list.empty() && (!oldest || list.front()->freed_at < oldest->front()->freed_at)) oldest = &list;
      Header* header = oldest->front();
      oldest->erase(oldest->begin());
      cached_ -= header->class_bytes;
      munmap(header, header->class_bytes);
    }
  }

  [[noreturn]] static void out_of_memory(size_t bytes) {
    TORCH_CHECK(false, "could not allocate ", bytes, " bytes of host memory");
    std::abort();
  }

  std::mutex mutex_;
  std::map<size_t, std::vector<Header*>> free_;
  size_t live_ = 0, cached_ = 0, peak_ = 0, mappings_ = 0;
  uint64_t clock_ = 0;
};

}  // namespace

extern "C" {
void sw_install_allocator() { c10::SetCPUAllocator(&CachingAllocator::instance(), /*priority=*/1); }
SwMemoryStats sw_memory_stats() { return CachingAllocator::instance().stats(); }
void sw_reset_peak() { CachingAllocator::instance().reset_peak(); }
void sw_release_cached() { CachingAllocator::instance().release_cached(); }
}
