// Autograd with given output gradients, storage that moves, and functions whose backward is written in Rust.
#include "shim.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Runs `body` and turns any exception into a message for Rust: nothing may unwind across the boundary.
template <typename Body>
char* guarded(Body&& body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& e) {
    return strdup(e.what());
  } catch (...) {
    return strdup("unknown C++ exception");
  }
}

variable_list gather(at::Tensor* const* tensors, size_t count) {
  variable_list list;
  list.reserve(count);
  for (size_t i = 0; i < count; ++i) list.push_back(tensors[i] ? *tensors[i] : at::Tensor());
  return list;
}

// Owns what Rust handed over, until the graph node dies.
struct Context {
  SwBackward backward;
  explicit Context(SwBackward b) : backward(b) {}
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  ~Context() { backward.release(backward.context); }
};

struct RustNode final : torch::autograd::Node {
  std::unique_ptr<Context> context;
  std::vector<SavedVariable> saved;

  std::string name() const override { return "RustNode"; }

  variable_list apply(variable_list&& grads) override {
    std::vector<at::Tensor> unpacked;
    unpacked.reserve(saved.size());
    for (auto& variable : saved) unpacked.push_back(variable.unpack(getptr()));
    std::vector<at::Tensor*> saved_ptrs, grad_ptrs;
    for (auto& tensor : unpacked) saved_ptrs.push_back(&tensor);
    for (auto& grad : grads) grad_ptrs.push_back(grad.defined() ? &grad : nullptr);
    const size_t num_results = num_outputs();
    std::vector<uint8_t> wanted(num_results);
    for (size_t i = 0; i < num_results; ++i) wanted[i] = task_should_compute_output(i);
    std::vector<at::Tensor*> results(num_results, nullptr);
    char* error = context->backward.run(context->backward.context, saved_ptrs.data(), saved_ptrs.size(), grad_ptrs.data(),
                                        grad_ptrs.size(), wanted.data(), results.data(), num_results);
    variable_list out(num_results);
    for (size_t i = 0; i < num_results; ++i) {
      std::unique_ptr<at::Tensor> result(results[i]);
      if (result) out[i] = std::move(*result);
    }
    if (error) {
      std::string text(error);
      free(error);
      throw std::runtime_error(text);
    }
    return out;
  }

  void release_variables() override {
    for (auto& variable : saved) variable.reset_data();
  }
};

}  // namespace

extern "C" {

void sw_free_message(char* message) { free(message); }

char* sw_grad(at::Tensor* const* outputs, at::Tensor* const* grad_outputs, size_t num_outputs, at::Tensor* const* inputs,
              size_t num_inputs, uint8_t keep_graph, at::Tensor** results) {
  return guarded([&] {
    auto grads = torch::autograd::grad(gather(outputs, num_outputs), gather(inputs, num_inputs),
                                       gather(grad_outputs, num_outputs), /*retain_graph=*/keep_graph != 0, /*create_graph=*/false,
                                       /*allow_unused=*/true);
    for (size_t i = 0; i < num_inputs; ++i) results[i] = grads[i].defined() ? new at::Tensor(std::move(grads[i])) : nullptr;
  });
}

char* sw_set_storage(at::Tensor* tensor, void* data, size_t num_bytes) {
  return guarded([&] {
    const auto& storage = tensor->storage();
    storage.set_data_ptr_noswap(at::DataPtr(data, tensor->device()));
    storage.set_nbytes(num_bytes);
  });
}

char* sw_link(SwBackward backward, at::Tensor* const* inputs, size_t num_inputs, at::Tensor* const* outputs,
              size_t num_outputs, at::Tensor* const* saved, const uint8_t* is_output, size_t num_saved) {
  auto context = std::make_unique<Context>(backward);
  return guarded([&] {
    const variable_list ins = gather(inputs, num_inputs);
    if (!torch::autograd::compute_requires_grad(at::ITensorListRef(ins))) return;
    std::shared_ptr<RustNode> node(new RustNode(), torch::autograd::deleteNode);
    node->context = std::move(context);
    node->set_next_edges(torch::autograd::collect_next_edges(ins));
    for (size_t i = 0; i < num_outputs; ++i) torch::autograd::set_history(*outputs[i], node);
    // After the outputs have their history: a saved output is kept without its own node, which would be a cycle.
    for (size_t i = 0; i < num_saved; ++i) node->saved.emplace_back(*saved[i], is_output[i] != 0);
  });
}
}
