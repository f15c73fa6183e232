#include "cpu/scratch.h"

#include <memory>
#include <new>

namespace jaxconv::cpu {

void* ThreadScratch(int64_t bytes) {
  constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(void* p) const { ::operator delete(p, kLine); }
  };
  thread_local std::unique_ptr<void, Free> buffer;
  thread_local int64_t size = 0;
  if (size < bytes) {
    buffer.reset();
    size = 0;
    buffer.reset(::operator new(static_cast<size_t>(bytes), kLine));
    size = bytes;
  }
  return buffer.get();
}

}  // namespace jaxconv::cpu
