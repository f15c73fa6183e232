// Memory for a call and for the tasks of a thread, kept for later ones: fresh memory comes as pages
// that have to be found one by one, which took up to a third of calls with large weights.
#ifndef JAXCONV_CPU_SCRATCH_H_
#define JAXCONV_CPU_SCRATCH_H_

#include <cstdint>

namespace jaxconv::cpu {

// At least `bytes`, aligned to a cache line, kept for the thread's next task. Its contents are what
// an earlier task left.
void* ThreadScratch(int64_t bytes);

// Of all that calls have given back, so much is kept in a process.
inline constexpr int64_t kMostKept = int64_t{64} << 20;

// At least `bytes`, aligned to a cache line, for as long as this lives; nobody else's meanwhile.
// Contents are what an earlier call left. Throws std::bad_alloc.
class CallScratch {
 public:
  explicit CallScratch(int64_t bytes);
  ~CallScratch();
  CallScratch(const CallScratch&) = delete;
  CallScratch& operator=(const CallScratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Where the system lets programs ask, large pages come 8 times faster than small ones.
void AskForLargePages(void* data, int64_t bytes);

}  // namespace jaxconv::cpu

#endif  // JAXCONV_CPU_SCRATCH_H_
