// What sees torch, through its stable ABI: one build serves torch >= 2.10 and every Python
// >= 3.10. Schemas, checks, the current stream, the thread pool. No arithmetic.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/kernels.h"
#include "../outcome.h"
#include "../python/guard.h"
#include "../python/survey.h"
#ifdef FUSED_ADAMW_CUDA
#include "../cuda/kernels.h"
// Absent from a CPU-only torch, where the extension must still load.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);
#endif

namespace fused_adamw {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRowWords = sizeof(Row) / sizeof(int64_t);
constexpr int64_t kChunkWords = sizeof(Chunk) / sizeof(int32_t);
constexpr int64_t kHyperWords = sizeof(Hyper) / sizeof(double);
constexpr int64_t kStatsWords = sizeof(ChunkStats) / sizeof(double);
// Below this many elements a step is over before a second thread has woken up.
constexpr int64_t kSerialElements = 1 << 15;

void check_table(const Tensor& t, const char* name, ScalarType dtype, int64_t words) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous() && t.dim() == 2 && t.size(1) == words,
                  "fused_adamw: ", name, " must be a contiguous table of ", words, " columns of its type");
}

template <typename T>
T* check_vector(const Tensor& t, const char* name, ScalarType dtype, int64_t numel, const Tensor& rows) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous() && t.numel() >= numel, "fused_adamw: ", name,
                  " must be contiguous, of its type, with at least ", numel, " elements");
  STD_TORCH_CHECK(t.device() == rows.device(), "fused_adamw: ", name, " must be on the device of rows");
  return static_cast<T*>(t.mutable_data_ptr());
}

Table check_tables(const Tensor& rows, const Tensor& grads, const Tensor& chunks, int64_t chunk_size) {
  check_table(rows, "rows", ScalarType::Long, kRowWords);
  check_table(chunks, "chunks", ScalarType::Int, kChunkWords);
  STD_TORCH_CHECK(chunks.device() == rows.device(), "fused_adamw: chunks must be on the device of rows");
  STD_TORCH_CHECK(chunk_size > 0, "fused_adamw: chunk_size must be positive, got ", chunk_size);
  return {static_cast<const Row*>(rows.const_data_ptr()),
          rows.size(0),
          check_vector<const uint64_t>(grads, "grads", ScalarType::Long, 0, rows),
          static_cast<const Chunk*>(chunks.const_data_ptr()),
          chunks.size(0),
          chunk_size};
}

// workspace: float64 (1 + n_chunks): a ticket, then a partial sum per chunk.
NormArgs norm_args(const Tensor& rows, const Tensor& grads, const Tensor& chunks, int64_t chunk_size,
                   int64_t grad_format, const Tensor& workspace, const Tensor& sum) {
  NormArgs args{};
  args.table = check_tables(rows, grads, chunks, chunk_size);
  args.grad = static_cast<FormatCode>(grad_format);
  double* work =
      check_vector<double>(workspace, "workspace", ScalarType::Double, 1 + args.table.n_chunks, rows);
  args.ticket = reinterpret_cast<uint32_t*>(work);
  args.partials = work + 1;
  args.sum = check_vector<double>(sum, "sum", ScalarType::Double, 1, rows);
  return args;
}

// formats: of parameters, gradients, exp_avg, exp_avg_sq and the average.
FormatCodes format_codes(const std::vector<int64_t>& formats) {
  STD_TORCH_CHECK(formats.size() == 5, "fused_adamw: formats must be five, got ", formats.size());
  const auto code = [&](int i) { return static_cast<FormatCode>(formats[i]); };
  return {code(0), code(1), code(2), code(3), code(4)};
}

// inputs: int64, the words of a StepInputs, on the host. stats: without rows, nothing is asked for.
UpdateArgs update_args(const Tensor& rows, const Tensor& grads, const Tensor& chunks, int64_t chunk_size,
                       const Tensor& hypers, const std::vector<int64_t>& formats, const Tensor& inputs,
                       const Tensor& workspace, const Tensor& stats) {
  UpdateArgs args{};
  args.table = check_tables(rows, grads, chunks, chunk_size);
  check_table(hypers, "hypers", ScalarType::Double, kHyperWords);
  args.hypers = static_cast<const Hyper*>(hypers.const_data_ptr());
  args.n_hypers = hypers.size(0);
  args.formats = format_codes(formats);
  STD_TORCH_CHECK(inputs.is_cpu() && inputs.scalar_type() == ScalarType::Long && inputs.is_contiguous() &&
                      inputs.numel() * sizeof(int64_t) == sizeof(StepInputs),
                  "fused_adamw: inputs must be ", sizeof(StepInputs) / sizeof(int64_t),
                  " contiguous words on the host");
  std::memcpy(&args.inputs, inputs.const_data_ptr(), sizeof args.inputs);
  STD_TORCH_CHECK(args.inputs.status, "fused_adamw: inputs must have a status");
  args.ticket =
      reinterpret_cast<uint32_t*>(check_vector<double>(workspace, "workspace", ScalarType::Double, 1, rows));
  check_table(stats, "stats", ScalarType::Double, kStatsWords);
  if (stats.size(0)) {
    args.stats = reinterpret_cast<ChunkStats*>(
        check_vector<double>(stats, "stats", ScalarType::Double, args.table.n_chunks * kStatsWords, rows));
  }
  return args;
}

const CpuKernels& best_cpu_kernels() {
#ifdef FUSED_ADAMW_X86
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return kCpuKernelsAvx512Bf16;
  if (avx512) return kCpuKernelsAvx512;
  if (__builtin_cpu_supports("avx2")) return kCpuKernelsAvx2;
#endif
  return kCpuKernelsBaseline;
}

const CpuKernels& cpu_kernels() {
  static const CpuKernels& kernels = best_cpu_kernels();
  return kernels;
}

// Runs body(begin, end) over the chunks on torch's thread pool. Threads draw batches of chunks from a
// counter, so that tensors of any sizes, and a busy core, leave none of them idle.
template <typename F>
void for_chunks(const Table& table, const F& body) {
  int64_t elements = 0;
  for (int64_t i = 0; i < table.n_rows && elements < kSerialElements; ++i) elements += table.rows[i].numel;
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || table.n_chunks == 1 || elements < kSerialElements) return body(0, table.n_chunks);
  const int64_t batch = std::clamp<int64_t>(table.n_chunks / (threads * 16), 1, 16);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      for (int64_t i; (i = next.fetch_add(batch, std::memory_order_relaxed)) < table.n_chunks;)
        body(i, std::min(i + batch, table.n_chunks));
    }
  });
}

void sum_of_squares_cpu(Tensor rows, Tensor grads, Tensor chunks, int64_t chunk_size, int64_t grad_format,
                        Tensor workspace, Tensor sum) {
  const NormArgs args = norm_args(rows, grads, chunks, chunk_size, grad_format, workspace, sum);
  STD_TORCH_CHECK(register_bytes<PlainFormats>(args.grad), "fused_adamw: no norm kernel for gradient format ",
                  grad_format);
  for_chunks(args.table, [&](int64_t begin, int64_t end) { cpu_kernels().norm_chunks(args, begin, end); });
  // In the order of the chunks: the same sum for any number of threads.
  double total = 0.0;
  for (int64_t i = 0; i < args.table.n_chunks; ++i) total += args.partials[i];
  *args.sum = total;
}

void update_cpu(Tensor rows, Tensor grads, Tensor chunks, int64_t chunk_size, Tensor hypers,
                std::vector<int64_t> formats, Tensor inputs, Tensor workspace, Tensor stats) {
  const UpdateArgs args =
      update_args(rows, grads, chunks, chunk_size, hypers, formats, inputs, workspace, stats);
  STD_TORCH_CHECK(share_arithmetic(args.formats), "fused_adamw: no update kernel for formats ", formats[0],
                  ", ", formats[1], ", ", formats[2], ", ", formats[3], ", ", formats[4]);
  const StepScalars scalars = step_scalars(args.inputs);
  record(args.inputs, scalars);
  if (scalars.skip) return;
  for_chunks(args.table, [&](int64_t begin, int64_t end) {
    cpu_kernels().update_chunks(args, scalars.grad_scale, begin, end);
  });
  for (int64_t i = 0; i < args.table.n_rows; ++i) {
    const Row& row = args.table.rows[i];
    if (args.table.grads[row.slot]) *reinterpret_cast<float*>(row.step) += 1.0f;
  }
}

#ifdef FUSED_ADAMW_CUDA
void* current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "fused_adamw: this torch has no CUDA support");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

void sum_of_squares_cuda(Tensor rows, Tensor grads, Tensor chunks, int64_t chunk_size, int64_t grad_format,
                         Tensor workspace, Tensor sum) {
  const NormArgs args = norm_args(rows, grads, chunks, chunk_size, grad_format, workspace, sum);
  const int32_t device = rows.get_device_index();
  const char* error = launch_norm(args, device, current_stream(device));
  STD_TORCH_CHECK(!error, "fused_adamw: norm kernel: ", error);
}

void update_cuda(Tensor rows, Tensor grads, Tensor chunks, int64_t chunk_size, Tensor hypers,
                 std::vector<int64_t> formats, Tensor inputs, Tensor workspace, Tensor stats) {
  const UpdateArgs args =
      update_args(rows, grads, chunks, chunk_size, hypers, formats, inputs, workspace, stats);
  const bool on_host = hypers.is_cpu();
  STD_TORCH_CHECK(!on_host || args.n_hypers <= kMaxInlineHypers,
                  "fused_adamw: a hypers table on the host holds at most ", kMaxInlineHypers, " rows, got ",
                  args.n_hypers);
  const int32_t device = rows.get_device_index();
  const char* error = launch_update(args, on_host, device, current_stream(device));
  STD_TORCH_CHECK(!error, "fused_adamw: update kernel: ", error);
}
#endif

// Whether `update` steps such tensors on this kind of device.
bool supports(std::string device_type, std::vector<int64_t> formats) {
  if (device_type == "cpu") return share_arithmetic(format_codes(formats));
#ifdef FUSED_ADAMW_CUDA
  if (device_type == "cuda") return cuda_supports(format_codes(formats));
#endif
  return false;
}

std::string build_info() {
  std::string version, archs, switches;
#ifdef FUSED_ADAMW_CUDA
  version = cuda_version();
  archs = cuda_archs();
  switches = cuda_switches();
#endif
  return "{\"cpu_capability\": \"" + std::string(cpu_kernels().capability) + "\", \"compiler\": \"" +
         FUSED_ADAMW_COMPILER + "\", \"cuda_version\": \"" + version + "\", \"cuda_archs\": \"" + archs +
         "\", \"cuda_switches\": \"" + switches + "\"}";
}

}  // namespace
}  // namespace fused_adamw

// The tensors that hold parameters are reached through the addresses in `rows`; what the schemas declare as
// mutated keeps the calls from being dropped or reordered.
STABLE_TORCH_LIBRARY(fused_adamw, m) {
  m.def(
      "sum_of_squares(Tensor rows, Tensor grads, Tensor chunks, int chunk_size, int grad_format, "
      "Tensor(a!) workspace, Tensor(b!) sum) -> ()");
  m.def(
      "update(Tensor rows, Tensor grads, Tensor chunks, int chunk_size, Tensor hypers, int[] formats, "
      "Tensor inputs, Tensor(a!) workspace, Tensor(b!) stats) -> ()");
  m.def("supports(str device_type, int[] formats) -> bool");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fused_adamw, CPU, m) {
  m.impl("sum_of_squares", TORCH_BOX(&fused_adamw::sum_of_squares_cpu));
  m.impl("update", TORCH_BOX(&fused_adamw::update_cpu));
}

#ifdef FUSED_ADAMW_CUDA
STABLE_TORCH_LIBRARY_IMPL(fused_adamw, CUDA, m) {
  m.impl("sum_of_squares", TORCH_BOX(&fused_adamw::sum_of_squares_cuda));
  m.impl("update", TORCH_BOX(&fused_adamw::update_cuda));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(fused_adamw, CompositeExplicitAutograd, m) {
  m.impl("supports", TORCH_BOX(&fused_adamw::supports));
  m.impl("build_info", TORCH_BOX(&fused_adamw::build_info));
}

// Importing fused_adamw._C loads the library, which registers the operators above.
PyMODINIT_FUNC PyInit__C(void) {
  using Fastcall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
  const auto fastcall = [](Fastcall function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
  };
  static PyMethodDef methods[] = {
      {"make_guard", fastcall(&fused_adamw::make_guard), METH_FASTCALL,
       "make_guard(tensor_type, params, grads, state, read, probes, table, by_objects)"},
      {"check_guard", fastcall(&fused_adamw::check_guard), METH_FASTCALL,
       "check_guard(guard, params, state) -> (int, bytes, list | None, list | capsule, bytes | None) | None"},
      {"count_changes", fastcall(&fused_adamw::count_changes), METH_FASTCALL, "count_changes(held)"},
      {"move_guard", fastcall(&fused_adamw::move_guard), METH_FASTCALL, "move_guard(guard, addresses)"},
      {"survey", fastcall(&fused_adamw::survey), METH_FASTCALL,
       "survey(tensor_type, tensors, probes) -> (bytes, bytes)"},
      {nullptr, nullptr, 0, nullptr},
  };
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
