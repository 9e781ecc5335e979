// What the Rust side calls. Every function that can fail returns null, or a message that the caller frees with
// `sw_free_message`. Tensors are pointers to `at::Tensor`, as in tch.
#pragma once
#include <cstddef>
#include <cstdint>

namespace at {
class Tensor;
}

extern "C" {
void sw_free_message(char* message);

// Gradients of `outputs`, weighted by `grad_outputs`, with respect to `inputs`. `results[i]` is a new tensor, or null
// if input `i` was not used. Frees the graph.
char* sw_grad(at::Tensor* const* outputs, at::Tensor* const* grad_outputs, size_t num_outputs, at::Tensor* const* inputs,
              size_t num_inputs, uint8_t keep_graph, at::Tensor** results);

// Points the storage of `tensor`, and so of all its views, at other memory. The storage must not own its memory.
char* sw_set_storage(at::Tensor* tensor, void* data, size_t num_bytes);

// A differentiable function whose backward is Rust.
struct SwBackward {
  void* context;
  // Fills `results` (null: no gradient) from the saved tensors and the output gradients (null: zero).
  char* (*run)(void* context, at::Tensor* const* saved, size_t num_saved, at::Tensor* const* grads, size_t num_grads,
               const uint8_t* wanted, at::Tensor** results, size_t num_results);
  void (*release)(void* context);
};

// Links `outputs`, computed without a graph, to `inputs` through `backward`. Takes `backward.context` in any case.
// Saved tensors are inputs (`is_output[i] == 0`) or outputs of the function.
char* sw_link(SwBackward backward, at::Tensor* const* inputs, size_t num_inputs, at::Tensor* const* outputs,
              size_t num_outputs, at::Tensor* const* saved, const uint8_t* is_output, size_t num_saved);

// The host allocator of libtorch that keeps its memory.
void sw_install_allocator();
struct SwMemoryStats {
  uint64_t live_bytes, cached_bytes, peak_live_bytes, num_segments;
};
SwMemoryStats sw_memory_stats();
void sw_reset_peak();
void sw_release_cached();

// The folder of libtorch's libraries: to be freed like a message; null if the system does not say.
char* sw_library_folder();

// Loads libtorch's CUDA for the process and says how many GPUs it sees.
char* sw_cuda_load(int32_t* num_gpus);
// What this thread does on GPU `ordinal` from now on goes to `stream`, a cudaStream_t.
char* sw_cuda_use_stream(int32_t ordinal, void* stream);
// A copy of a host tensor on GPU `ordinal`, queued on the current stream, by way of pinned memory.
char* sw_cuda_upload(at::Tensor* tensor, int32_t ordinal, at::Tensor** result);
// Operations that have a form without atomic additions take it; those that have none fail.
char* sw_cuda_set_deterministic(uint8_t on);
// Whether attention may take cuDNN's form, which is compiled anew for each shape.
char* sw_cuda_set_cudnn_attention(uint8_t on);
// libtorch's memory on a GPU: in use by tensors, and taken from the driver.
struct SwCudaMemory {
  uint64_t allocated_bytes, peak_allocated_bytes, reserved_bytes, peak_reserved_bytes, num_device_allocations;
};
char* sw_cuda_memory(int32_t ordinal, SwCudaMemory* memory);
char* sw_cuda_reset_peak(int32_t ordinal);
char* sw_cuda_release_cached();
}
