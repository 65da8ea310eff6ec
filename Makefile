# Each command sets up what it needs in .venv (triton-ascend, where it has wheels) or .venv-portable (community Triton).
# those that triton-ascend 3.2.0 has wheels for come first
PYTHONS := python3.11 python3.10 python3
PYTHON ?= $(or $(shell for p in $(PYTHONS); do $$p -c 'import ensurepip' 2>/dev/null && echo $$p && break; done),python3)
BIN := .venv/bin
PORTABLE := .venv-portable/bin
# a process and a thread a core
PYTEST := -m pytest -n auto --dist worksteal
KERNEL_TESTS := tests/test_kernels.py tests/test_repair.py tests/test_append.py

.PHONY: test test-portable test-large lint train generate bench sweep clean

test test-portable: export OMP_NUM_THREADS := 1
test: .venv/ready ## everything that needs no accelerator
	$(BIN)/python $(PYTEST)
	@if grep -q ascend .venv/ready; then \
	  $(BIN)/python $(PYTEST) --kernels host tests/ascend $(KERNEL_TESTS) && \
	  $(BIN)/python $(PYTEST) --kernels simulator $(KERNEL_TESTS); \
	else \
	  echo "left out: the kernels run natively, and compiled for Ascend. Both need triton-ascend 3.2.0, which has wheels" \
	    "for Linux x86-64 with CPython 3.10 and 3.11; .venv has $$($(BIN)/python -V)"; \
	fi

test-portable: .venv-portable/ready ## the kernels under community Triton's interpreter, and compiled for GPUs
	$(PORTABLE)/python $(PYTEST) tests/test_launch.py $(KERNEL_TESTS)
	$(PORTABLE)/python $(PYTEST) --kernels compiled tests/gpu

test-large: .venv/ready ## values past 2^31 elements, on the CPU and through the kernels: some minutes, 6 GB of memory
	$(BIN)/python -m pytest -vv --large tests/large/test_far_cpu.py
	@if grep -q ascend .venv/ready; then \
	  $(BIN)/python -m pytest -vv --large --kernels host tests/large/test_far_kernels.py; \
	else \
	  echo "left out: the kernels, which run natively where there is triton-ascend"; \
	fi

sweep: .venv/ready ## compile the whole legal grid for every target; goes on where it stopped
	$(BIN)/python -m nsa.ascend sweep --out docs/evidence/sweep.json

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# threads that wait asleep: where other processes want the cores, spinning ones make all wait
train generate bench: export OMP_WAIT_POLICY := PASSIVE
train: .venv/ready ## the example on real text, with and without the compressed branch
	$(BIN)/python examples/train_lm.py --compare

generate: .venv/ready ## text by the example's model, its compressed branch read from caches; ARGS="--prompt Modules", "--help"
	$(BIN)/python examples/generate.py $(ARGS)

bench: .venv/ready ## times against what people would use instead; ARGS="--quick", "--device npu", "--help"
	$(BIN)/python benchmarks/bench_compress.py $(ARGS)

.venv/ready: setup.py pyproject.toml .ci/environment
	.ci/environment .venv $(PYTHON)

.venv-portable/ready: setup.py pyproject.toml .ci/environment
	.ci/environment .venv-portable $(PYTHON) community

clean:
	rm -rf .venv .venv-portable
