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
}
