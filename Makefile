# Every target sets up what it needs; `make setup` alone fetches libtorch once.
.DEFAULT_GOAL := help
.PHONY: help setup nvrtc build demo test test-fast fuzz bench fmt lint

CARGO ?= cargo
PYTHON ?= python3

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## fetch libtorch 2.11.0 (CUDA=1: with its CUDA libraries; LIBTORCH=DIR: use that one)
	@scripts/setup.sh

nvrtc: ## fetch NVRTC, with which tests compile the CUDA kernels (90 MB; SHARDWISE_NVRTC=DIR: use that one)
	@scripts/setup_nvrtc.sh

build: setup ## build target/release/shardwise and target/release/shardwise-worker
	$(CARGO) build --release -p shardwise-cli -p shardwise-worker

demo: build ## train a small Llama on Shakespeare on 2 CPU ranks with ZeRO-2 and print a sample
	target/release/shardwise train examples/demo/run.toml -n 2 --out out/demo --overwrite

.PHONY: finetune
finetune: build ## fine-tune SmolLM2-135M (a download of 93 MB) on Shakespeare, perplexity before and after
	examples/finetune-smollm2/run.sh

# One build of everything, both binaries included: what is tested is what is shipped.
test: setup nvrtc ## run all tests
	$(PYTHON) gpu/selftest.py
	$(CARGO) test --release --workspace --no-fail-fast
	target/release/examples/custom_model # built with the tests

test-fast: nvrtc ## run the tests of the crates that need no libtorch, with assertions and checks for overflow
	$(CARGO) test --no-fail-fast

fuzz: ## try hostile checkpoints, GGUF files and cuts of tensors for some minutes (CASES=200000: for each test)
	PROPTEST_CASES=$(or $(CASES),200000) $(CARGO) test --release -p shardwise-checkpoint --lib
	PROPTEST_CASES=$(or $(CASES),200000) $(CARGO) test --release -p shardwise-checkpoint --test gguf hostile

.PHONY: gpu-bundle
gpu-bundle: build ## pack target/gpu-bundle.tar.xz: what a machine with GPUs needs to run gpu/check.sh (docs/gpu.md)
	scripts/gpu_bundle.sh

bench: build ## run the benchmarks
	$(CARGO) bench -p shardwise-comm -p shardwise-kernels -p shardwise-engine -p shardwise-checkpoint

fmt: ## format the code
	$(CARGO) fmt --all

lint: setup ## check format and lints
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --release -- -D warnings
