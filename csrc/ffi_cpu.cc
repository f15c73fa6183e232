// The compiled module jaxconv._cpu: FFI handlers for XLA's CPU platform, and its kernel table.
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "bindings.h"
#include "cpu/scratch.h"
#include "cpu/table.h"
#include "dispatch.h"

namespace jaxconv::cpu {
namespace {

// XLA's own intra-op threads. The caller works too and never waits for a task nobody has started,
// so calls that run at the same time on a busy pool cannot block each other.
class PoolParallel final : public Parallel {
 public:
  explicit PoolParallel(ffi::ThreadPool& pool) : pool_(pool) {}

  void For(int64_t count, const std::function<void(int64_t)>& task) const override {
    struct alignas(64) Range {
      std::atomic<int64_t> next{0};
      int64_t end = 0;
    };
    struct State {
      explicit State(int64_t workers) : ranges(static_cast<size_t>(workers)) {}
      std::vector<Range> ranges;
      std::atomic<int64_t> joined{0};
      std::mutex mutex;
      std::condition_variable all_done;
      int64_t done = 0;
      std::exception_ptr error;
    };
    const int64_t workers = std::min<int64_t>(pool_.num_threads(), count);
    if (workers <= 1) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    // A helper that starts after everything is done touches only the state, which it shares, and
    // never the task, which belongs to this call's stack.
    const auto state = std::make_shared<State>(workers);
    for (int64_t w = 0; w < workers; ++w) {
      Range& range = state->ranges[static_cast<size_t>(w)];
      range.next = count * w / workers;
      range.end = count * (w + 1) / workers;
    }
    // Neighbouring tasks read what is near in memory: each thread has a range of them, and then
    // takes those that others have not come to.
    const auto work = [state, count, workers, &task] {
      const int64_t self = state->joined.fetch_add(1);
      int64_t finished = 0;
      std::exception_ptr error;
      for (int64_t w = 0; w < workers; ++w) {
        Range& range = state->ranges[static_cast<size_t>((self + w) % workers)];
        for (int64_t i; (i = range.next.fetch_add(1)) < range.end; ++finished) {
          try {
            if (!error) task(i);
          } catch (...) {
            error = std::current_exception();
          }
        }
      }
      if (finished == 0) return;
      const std::lock_guard<std::mutex> lock(state->mutex);
      if (error) state->error = error;
      state->done += finished;
      if (state->done == count) state->all_done.notify_all();
    };
    for (int64_t w = 1; w < workers; ++w) pool_.Schedule([work] { work(); });
    work();
    std::unique_lock<std::mutex> lock(state->mutex);
    state->all_done.wait(lock, [&] { return state->done == count; });
    if (state->error) std::rethrow_exception(state->error);
  }

 private:
  ffi::ThreadPool& pool_;
};

template <Pass pass>
ffi::Error Handle(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                  ffi::Span<const int64_t> stride, ffi::Span<const int64_t> dilation,
                  ffi::Span<const int64_t> pad, int64_t groups, int64_t stack,
                  int64_t channels_last, int64_t precision, std::string_view kernel) {
  const Attributes attributes{stride, dilation,      pad,       groups,
                              stack,  channels_last, precision, kernel};
  const auto call = DecodeCall(pass, args, rets, attributes);
  if (!call.has_value()) return call.error();
  const auto poison = [](void* data, int64_t bytes) {
    if (bytes > 0 && Poisoned()) std::memset(data, kPoison, static_cast<size_t>(bytes));
  };
  // A large result is fresh memory in every call, whose small pages can take longer than the
  // kernel.
  AskForLargePages(call->operands.out, call->out_bytes);
  poison(call->operands.out, call->out_bytes);
  const Device device{static_cast<int>(std::max<int64_t>(pool.num_threads(), 1)), VectorBytes()};
  const PoolParallel parallel(pool);
  return Dispatch(Table(), device, *call, kNoWorkspaceLimit,
                  [&](const Row& row, const Problem& problem, Operands operands) {
                    // XLA's would be fresh memory, too.
                    const int64_t bytes = row.workspace(problem, device);
                    try {
                      const CallScratch workspace(bytes);
                      poison(workspace.data(), bytes);
                      operands.workspace = workspace.data();
                      row.launch(problem, operands, parallel);
                    } catch (const std::bad_alloc&) {
                      return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                                        "jaxconv: no memory for a workspace of " +
                                            std::to_string(bytes) + " bytes, or for a thread's");
                    }
                    return ffi::Error::Success();
                  });
}

#define JAXCONV_CPU_HANDLER(name, pass)      \
  XLA_FFI_DEFINE_HANDLER(name, Handle<pass>, \
                         ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().JAXCONV_BIND_ATTRIBUTES())
JAXCONV_CPU_HANDLER(kForwardHandler, Pass::kForward);
JAXCONV_CPU_HANDLER(kInputGradHandler, Pass::kInputGrad);
JAXCONV_CPU_HANDLER(kWeightGradHandler, Pass::kWeightGrad);

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of jaxconv.";
  py::class_<Device>(m, "Device", "What the choice of a CPU kernel depends on.")
      .def(py::init([](int threads, int vector_bytes) { return Device{threads, vector_bytes}; }),
           py::kw_only(), py::arg("threads"), py::arg("vector_bytes") = VectorBytes());
  BindTable<Device>(m, &Table);
  m.def("handlers", [] {
    py::dict handlers;
    handlers["forward"] = HandlerCapsule(kForwardHandler);
    handlers["input_grad"] = HandlerCapsule(kInputGradHandler);
    handlers["weight_grad"] = HandlerCapsule(kWeightGradHandler);
    return handlers;
  });
}

}  // namespace jaxconv::cpu
