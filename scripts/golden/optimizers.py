"""Writes how PyTorch and DeepSpeed move parameters in ten steps.

    python optimizers.py crates/kernels/fixtures/optimizers.json

For each optimizer: its hyperparameters and, for each size, parameters and states after ten steps: all elements of the sizes
1, 15 and 64, every 15,991st of 1,000,003. Values and gradients are exact in fp32, and no gradient is zero:

    p[i] = (37 i mod 1009 - 504) / 512
    g[i] = (2 ((7919 i + 104729 t) mod 2003) - 2003) / 2048      in step t = 1, 2, ..., given to the optimizer times 0.25

AdamW, Adam, SGD and Adagrad are torch.optim's; Lion is DeepSpeed's CPU Lion. LAMB has no CPU form: `lamb` below writes out
DeepSpeed's CUDA kernel in fp64. Muon is DeepSpeed's, with its iteration in fp32, and torch.optim.Muon, which iterates in bf16.
"""
import argparse, json, math
import torch

STEPS, SCALE, SIZES, STRIDE = 10, 0.25, [1, 15, 64, 1_000_003], 15_991
SHAPES = [(1, 1), (3, 5), (64, 64), (200, 136), (136, 300)]


def start(numel):
    return ((torch.arange(numel) * 37) % 1009 - 504).float() / 512


def gradient(numel, step):
    return (2 * ((torch.arange(numel) * 7919 + step * 104729) % 2003) - 2003).float() / 2048 * SCALE


def sampled(x):
    x = x.detach().flatten().double()
    return (x if x.numel() <= 64 else x[::STRIDE if x.numel() > 100_000 else 331]).tolist()


def run(make, names, shapes):
    out = []
    for shape in shapes:
        numel = math.prod(shape)
        p = torch.nn.Parameter(start(numel).reshape(shape))
        optimizer = make([p])
        for step in range(1, STEPS + 1):
            p.grad = gradient(numel, step).reshape(shape)
            optimizer.step()
        state = optimizer.state[p]
        out.append({"shape": list(shape), "param": sampled(p),
                    "states": {ours: sampled(state[theirs]) for ours, theirs in names.items()}})
    return out


class Lamb:
    """DeepSpeed's lamb_cuda_kernel.cu, eps outside of the root, in fp64."""

    def __init__(self, params, lr, betas, eps, weight_decay, max_coeff, min_coeff):
        self.params, self.state, self.steps = params, {}, 0
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, weight_decay
        self.max_coeff, self.min_coeff = max_coeff, min_coeff

    def step(self):
        self.steps += 1
        (p,), (b1, b2) = self.params, self.betas
        state = self.state.setdefault(p, {"p": p.data.double(), "exp_avg": torch.zeros_like(p.data).double(),
                                          "exp_avg_sq": torch.zeros_like(p.data).double()})
        g, m, v, w = p.grad.double(), state["exp_avg"], state["exp_avg_sq"], state["p"]
        m.mul_(b1).add_(g, alpha=1 - b1)
        v.mul_(b2).add_(g * g, alpha=1 - b2)
        update = m / (v.sqrt() + self.eps) + self.decay * w
        w_norm, u_norm = w.norm().item(), update.norm().item()
        coeff = 1.0 if w_norm == 0 or u_norm == 0 else min(max(w_norm / u_norm, self.min_coeff), self.max_coeff)
        rate = self.lr * math.sqrt(1 - b2 ** self.steps) / (1 - b1 ** self.steps)
        w.sub_(rate * coeff * update)
        p.data.copy_(w)


class DeepSpeedMuon:
    def __init__(self, params, lr, momentum, weight_decay, nesterov):
        self.params, self.state = params, {}
        self.lr, self.momentum, self.decay, self.nesterov = lr, momentum, weight_decay, nesterov

    @torch.no_grad()
    def step(self):
        from deepspeed.runtime.zero.muon import original_muon
        original_muon.ns_compute_dtype = lambda method="gram": torch.float32
        (p,) = self.params
        state = self.state.setdefault(p, {"momentum_buffer": torch.zeros_like(p)})
        update = original_muon.muon_update(p.grad.clone(), state["momentum_buffer"], beta=self.momentum,
                                           nesterov=self.nesterov, ns_method="standard")
        p.mul_(1 - self.lr * self.decay)
        p.add_(update, alpha=-self.lr)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch._dynamo.config.disable = True
    from deepspeed.ops.lion import DeepSpeedCPULion
    optim, vectors, cases = torch.optim, [(size,) for size in SIZES], {}
    moments = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    momentum = {"momentum_buffer": "momentum_buffer"}

    def case(name, make, hyper, states, shapes=vectors):
        cases[name] = {"hyper": hyper, "runs": run(lambda params: make(params, **hyper), states, shapes)}

    plain = {"foreach": False}
    adam = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    case("adamw", lambda p, **k: optim.AdamW(p, **k, **plain), adam, moments)
    case("adam", lambda p, **k: optim.Adam(p, **k, **plain), adam, moments)
    sgd = {"lr": 1e-2, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.1, "nesterov": False}
    case("sgd", lambda p, **k: optim.SGD(p, **k, **plain), sgd, {})
    case("sgd_momentum", lambda p, **k: optim.SGD(p, **k, **plain), {**sgd, "momentum": 0.9, "dampening": 0.3}, momentum)
    case("sgd_nesterov", lambda p, **k: optim.SGD(p, **k, **plain), {**sgd, "momentum": 0.9, "nesterov": True}, momentum)
    case("adagrad", lambda p, **k: optim.Adagrad(p, **k, **plain),
         {"lr": 1e-2, "lr_decay": 0.05, "weight_decay": 0.1, "eps": 1e-10, "initial_accumulator_value": 0.1}, {"sum": "sum"})
    case("lion", DeepSpeedCPULion, {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}, {"exp_avg": "exp_avg"})
    case("lamb", Lamb, {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1, "max_coeff": 10.0,
                        "min_coeff": 0.01}, moments)
    muon = {"lr": 1e-2, "momentum": 0.95, "weight_decay": 0.1, "nesterov": True}
    case("muon", DeepSpeedMuon, muon, momentum, SHAPES)
    case("muon_plain", DeepSpeedMuon, {**muon, "nesterov": False}, momentum, SHAPES)
    case("muon_torch", optim.Muon, muon, momentum, SHAPES)
    with open(out, "w") as file:
        json.dump({"torch": torch.__version__, "cases": cases}, file, separators=(",", ":"))
        file.write("\n")


if __name__ == "__main__":
    main()
