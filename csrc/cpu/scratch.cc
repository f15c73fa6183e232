#include "cpu/scratch.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace jaxconv::cpu {
namespace {

constexpr std::align_val_t kLine{64};

void* Allocate(int64_t bytes) { return ::operator new(static_cast<size_t>(bytes), kLine); }
void Free(void* p) { ::operator delete(p, kLine); }

// What calls have given back. As few calls run at once, a list does.
class Kept {
 public:
  // The smallest block of at least `bytes`, if there is one; sets `bytes` to what it has.
  void* Take(int64_t& bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = blocks_.end();
    for (auto b = blocks_.begin(); b != blocks_.end(); ++b) {
      if (b->bytes >= bytes && (best == blocks_.end() || b->bytes < best->bytes)) best = b;
    }
    if (best == blocks_.end()) return nullptr;
    const Block taken = *best;
    blocks_.erase(best);
    kept_ -= taken.bytes;
    bytes = taken.bytes;
    return taken.data;
  }

  // Keeps the block, and gives up the smallest ones for it if all are too much.
  void Give(void* data, int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.push_back({data, bytes});
    kept_ += bytes;
    while (kept_ > kMostKept) {
      const auto least =
          bytes > kMostKept
              ? blocks_.end() - 1
              : std::min_element(blocks_.begin(), blocks_.end(),
                                 [](const Block& a, const Block& b) { return a.bytes < b.bytes; });
      kept_ -= least->bytes;
      Free(least->data);
      blocks_.erase(least);
    }
  }

 private:
  struct Block {
    void* data;
    int64_t bytes;
  };
  std::mutex mutex_;
  std::vector<Block> blocks_;
  int64_t kept_ = 0;
};

// Never destroyed: threads of XLA's may outlive static objects.
Kept& AllKept() {
  static Kept* kept = new Kept;
  return *kept;
}

}  // namespace

void* ThreadScratch(int64_t bytes) {
  struct Release {
    void operator()(void* p) const { Free(p); }
  };
  thread_local std::unique_ptr<void, Release> buffer;
  thread_local int64_t size = 0;
  if (size < bytes) {
    buffer.reset();
    size = 0;
    buffer.reset(Allocate(bytes));
    size = bytes;
  }
  return buffer.get();
}

CallScratch::CallScratch(int64_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  data_ = AllKept().Take(bytes_);
  if (data_ != nullptr) return;
  data_ = Allocate(bytes_);
  AskForLargePages(data_, bytes_);
}

CallScratch::~CallScratch() {
  if (data_ != nullptr) AllKept().Give(data_, bytes_);
}

void AskForLargePages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  // A refusal only means that pages stay small.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace jaxconv::cpu
