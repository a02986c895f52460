// The host's side of CUDA under the emulation: kernels go into the streams of the pretend GPU.
//
// Before a kernel runs, every address it will follow has to be of memory that is in use: where a GPU might
// read what another tensor has left there, or fault, the next launch or wait reports an illegal access.
#pragma once

#include <cxxabi.h>

#include <functional>
#include <string>
#include <typeinfo>

#include "formats.h"

using cudaStream_t = void*;
using cudaError_t = int;
enum { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

extern "C" {
cudaError_t cudaGetDevice(int*);
cudaError_t cudaSetDevice(int);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t);
cudaError_t pretend_gpu_launch(void* stream, const char* name, std::function<void()>* work);
bool pretend_gpu_is_live(const void* address, size_t bytes);
void pretend_gpu_fault(const char* what);
}

namespace pretend_gpu {

// Follows a kernel's tables; remembers the first address that is not of memory in use.
class Bounds {
 public:
  explicit Bounds(const char* kernel) : kernel_(kernel) {}

  bool hold() const { return hold_; }

  // What both kernels follow; under `update`, which is null for the norm, all that it steps besides.
  void table(const fused_adamw::Table& table, fused_adamw::FormatCode grad,
             const fused_adamw::UpdateArgs* update) {
    needs(table.rows, table.n_rows * sizeof(fused_adamw::Row), "table of rows");
    needs(table.chunks, table.n_chunks * sizeof(fused_adamw::Chunk), "table of chunks");
    if (!hold_) return;
    for (int64_t i = 0; i < table.n_chunks; ++i) {
      if (static_cast<uint64_t>(table.chunks[i].row) >= static_cast<uint64_t>(table.n_rows))
        fail("row of a chunk");
    }
    for (int64_t i = 0; i < table.n_rows && hold_; ++i) {
      const fused_adamw::Row& row = table.rows[i];
      if (row.slot < 0) return fail("slot of a row");
      needs(table.grads + row.slot, sizeof(uint64_t), "table of gradients");
      if (!hold_ || !table.grads[row.slot]) continue;
      tensor({table.grads[row.slot], 0}, grad, row, "gradient");
      if (!update) continue;
      needs(row.step, sizeof(float), "step count");
      if (row.hyper < 0 || row.hyper >= update->n_hypers) fail("hyper of a row");
      const fused_adamw::FormatCodes& formats = update->formats;
      tensor(row.param, formats.param, row, "parameter");
      tensor(row.exp_avg, formats.exp_avg, row, "exp_avg");
      tensor(row.exp_avg_sq, formats.exp_avg_sq, row, "exp_avg_sq");
      if (row.max_exp_avg_sq.values) tensor(row.max_exp_avg_sq, formats.exp_avg, row, "max_exp_avg_sq");
      if (row.average.values) tensor(row.average, formats.average, row, "average");
    }
  }

  // The values of a row, and what is kept beside them.
  void tensor(const fused_adamw::Field& field, fused_adamw::FormatCode code, const fused_adamw::Row& row,
              const char* what) {
    fused_adamw::Formats::visit(code, [&](auto format) {
      using Format = decltype(format);
      needs(field.values, row.numel * sizeof(typename Format::Stored), what);
      const std::string side = std::string("what is kept beside the values of ") + what;
      if constexpr (Format::kSide == fused_adamw::kSidePerValue) {
        needs(field.side, row.numel * sizeof(typename Format::Side), side.c_str());
      } else if constexpr (Format::kSide == fused_adamw::kSidePerBlock) {
        const int64_t blocks = (row.local_columns + fused_adamw::kCodeBlock - 1) / fused_adamw::kCodeBlock;
        const int64_t sides = row.numel / row.local_columns * blocks;
        needs(field.side, sides * sizeof(typename Format::Side), side.c_str());
      }
    });
  }

  template <typename Address>
  void needs(Address address, size_t bytes, const char* what) {
    if (hold_ && bytes && !pretend_gpu_is_live((const void*)address, bytes)) fail(what);
  }

 private:
  void fail(const char* what) {
    if (hold_)
      pretend_gpu_fault((std::string(what) + " of kernel " + kernel_ + " is not in memory in use").c_str());
    hold_ = false;
  }

  const char* kernel_;
  bool hold_ = true;
};

inline bool in_bounds(const fused_adamw::NormArgs& args, const char* kernel) {
  Bounds bounds(kernel);
  bounds.table(args.table, args.grad, nullptr);
  bounds.needs(args.partials, args.table.n_chunks * sizeof(double), "partial sums");
  bounds.needs(args.sum, sizeof(double), "sum");
  bounds.needs(args.ticket, sizeof(uint32_t), "ticket");
  return bounds.hold();
}

// The update kernel's parameters: UpdateArgs, and the hypers unless these are on the device.
template <typename Params>
bool in_bounds(const Params& params, const char* kernel) {
  const fused_adamw::UpdateArgs& args = params.args;
  const fused_adamw::StepInputs& inputs = args.inputs;
  Bounds bounds(kernel);
  bounds.table(args.table, args.formats.grad, &args);
  if (args.hypers) bounds.needs(args.hypers, args.n_hypers * sizeof(fused_adamw::Hyper), "table of hypers");
  if (!bounds.hold()) return false;
  const fused_adamw::Hyper* hypers = args.hypers ? args.hypers : params.hypers;
  for (int64_t i = 0; i < args.n_hypers; ++i) {
    if (hypers[i].lr_address) bounds.needs(hypers[i].lr_address, sizeof(float), "lr");
  }
  if (inputs.sums) bounds.needs(inputs.sums, inputs.n_sums * sizeof(double), "sums");
  if (inputs.grad_scale) bounds.needs(inputs.grad_scale, sizeof(float), "grad_scale");
  if (inputs.found_inf) bounds.needs(inputs.found_inf, sizeof(float), "found_inf");
  if (inputs.loss) bounds.needs(inputs.loss, sizeof(double), "loss");
  // With a history of spikes, and two series that have a value in their structs.
  const size_t series = sizeof(fused_adamw::Series) + (inputs.spikes.window - 1) * sizeof(double);
  const size_t history = inputs.spikes.window ? sizeof(fused_adamw::SpikeHistory) + 2 * series : 0;
  bounds.needs(inputs.status, sizeof(fused_adamw::Status) + history, "status");
  if (args.stats) bounds.needs(args.stats, args.table.n_chunks * sizeof(fused_adamw::ChunkStats), "stats");
  bounds.needs(args.ticket, sizeof(uint32_t), "ticket");
  return bounds.hold();
}

}  // namespace pretend_gpu

template <typename F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
template <typename Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 threads, void** arguments, size_t,
                             cudaStream_t stream) {
  static const char* name = abi::__cxa_demangle(typeid(Params).name(), nullptr, nullptr, nullptr);
  const Params params = *static_cast<const Params*>(arguments[0]);  // a launch copies its arguments
  std::function<void()> work = [=] {
    if (pretend_gpu::in_bounds(params, name)) emulation::run_grid([&] { kernel(params); }, grid, threads);
  };
  return pretend_gpu_launch(stream, name, &work);
}
