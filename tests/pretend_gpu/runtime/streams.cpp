// Streams, events and graphs.
#include "gpu.h"

using namespace pretend_gpu;

namespace {

struct Event {
  std::shared_ptr<Mark> mark;  // null: never recorded
};

using Graph = std::shared_ptr<Capture>;

Event* event_of(cudaEvent_t handle) { return reinterpret_cast<Event*>(handle); }
Graph* graph_of(cudaGraph_t handle) { return reinterpret_cast<Graph*>(handle); }
Graph* graph_of(cudaGraphExec_t handle) { return reinterpret_cast<Graph*>(handle); }

cudaError_t create(cudaStream_t* handle) {
  Lock lock;
  *handle = reinterpret_cast<cudaStream_t>(new_stream());
  return cudaSuccess;
}

cudaStreamCaptureStatus status_of(const Stream* stream) {
  return !stream->capture             ? cudaStreamCaptureStatusNone
         : stream->capture->is_broken ? cudaStreamCaptureStatusInvalidated
                                      : cudaStreamCaptureStatusActive;
}

}  // namespace

// ---- Streams

EXPORTED cudaError_t cudaStreamCreate(cudaStream_t* handle) { return create(handle); }
EXPORTED cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned) { return create(handle); }
EXPORTED cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned, int) {
  return create(handle);
}
EXPORTED cudaError_t cudaStreamDestroy(cudaStream_t) {
  return cudaSuccess;
}  // streams stay: torch pools them
EXPORTED cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Lock lock;
  if (stream_of(handle)->capture || capture_forbids()) return break_captures();
  return stream_of(handle)->pending.empty() ? cudaSuccess : cudaErrorNotReady;
}
EXPORTED cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Lock lock;
  if (stream_of(handle)->capture) return break_captures();
  note("synchronize stream");
  run(stream_of(handle));
  return take_fault();
}
EXPORTED cudaError_t cudaDeviceSynchronize() {
  Lock lock;
  if (is_any_capture_active()) return break_captures();
  note("synchronize device");
  run_everything();
  return take_fault();
}
EXPORTED cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  Lock lock;
  append(stream_of(handle), "host function", [=] { function(data); });
  return cudaSuccess;
}
EXPORTED cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t function, void* data,
                                           unsigned) {
  Lock lock;
  append(stream_of(handle), "host function", [=] { function(handle, cudaSuccess, data); });
  return cudaSuccess;
}

// ---- Events

EXPORTED cudaError_t cudaEventCreate(cudaEvent_t* handle) {
  *handle = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned) {
  return cudaEventCreate(handle);
}
EXPORTED cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  delete event_of(handle);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  Lock lock;
  Stream* stream = stream_of(stream_handle);
  const auto mark = std::make_shared<Mark>(Mark{stream, stream->capture});
  event_of(handle)->mark = mark;
  if (!stream->capture) append(stream, "event", [mark] { mark->is_reached = true; });
  return cudaSuccess;
}
EXPORTED cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream, unsigned) {
  return cudaEventRecord(handle, stream);
}
EXPORTED cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Lock lock;
  const auto& mark = event_of(handle)->mark;
  if (capture_forbids() || (mark && mark->capture)) return break_captures();
  return !mark || mark->is_reached ? cudaSuccess : cudaErrorNotReady;
}
EXPORTED cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Lock lock;
  const auto& mark = event_of(handle)->mark;
  if (capture_forbids() || (mark && mark->capture)) return break_captures();
  note("synchronize event");
  if (mark) run_until(mark);
  return take_fault();
}
EXPORTED cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1.0f;  // time means nothing here
  return cudaSuccess;
}
EXPORTED cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  Lock lock;
  Stream* stream = stream_of(handle);
  const auto mark = event_of(event)->mark;
  if (!mark) return cudaSuccess;
  if (mark->capture && mark->stream->capture == mark->capture) {
    stream->capture = mark->capture;  // the capture spreads to streams that wait for it
  } else if (!stream->capture && mark->stream != stream) {
    append(stream, "", [mark] { run_until(mark); });
  }
  return cudaSuccess;
}

// ---- Graphs

EXPORTED cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Lock lock;
  static unsigned long long id = 0;
  stream_of(handle)->capture = std::make_shared<Capture>(Capture{++id, mode});
  return cudaSuccess;
}
EXPORTED cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Lock lock;
  const auto capture = stream_of(handle)->capture;
  leave_capture(capture);
  *graph = nullptr;
  if (capture->is_broken) return failed(cudaErrorStreamCaptureInvalidated);
  *graph = reinterpret_cast<cudaGraph_t>(new Graph(capture));
  return cudaSuccess;
}
EXPORTED cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  Lock lock;
  *status = status_of(stream_of(handle));
  return cudaSuccess;
}
EXPORTED cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                              unsigned long long* id, cudaGraph_t* graph,
                                              const cudaGraphNode_t** dependencies, const cudaGraphEdgeData**,
                                              size_t* n_dependencies) {
  Lock lock;
  const Stream* stream = stream_of(handle);
  *status = status_of(stream);
  if (id && stream->capture) *id = stream->capture->id;
  if (graph) *graph = nullptr;
  if (dependencies) *dependencies = nullptr;
  if (n_dependencies) *n_dependencies = 0;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                                   unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*graph_of(graph)));
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
  Lock lock;
  if (const cudaError_t error = take_fault()) return error;
  note("replay");
  for (const Operation& operation : (*graph_of(executable))->operations) {
    append(stream_of(handle), operation.name.empty() ? "" : "replayed " + operation.name, operation.work);
  }
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph_of(graph);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  Lock lock;
  run_everything();
  delete graph_of(executable);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = 0;
  for (const Operation& operation : (*graph_of(graph))->operations) *count += !operation.name.empty();
  return cudaSuccess;
}
