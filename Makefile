# Each command sets up what it needs in .venv (triton-ascend) or .venv-portable (community Triton).
PYTHON ?= python3
BIN := .venv/bin
PORTABLE := .venv-portable/bin
# a process and a thread a core
PYTEST := -m pytest -n auto --dist worksteal

.PHONY: test test-portable lint train bench sweep clean

test test-portable: export OMP_NUM_THREADS := 1
test: .venv/ready ## everything that needs no accelerator
	$(BIN)/python $(PYTEST)
	$(BIN)/python $(PYTEST) --kernels host tests/ascend tests/test_kernels.py tests/test_repair.py

test-portable: .venv-portable/ready ## the kernels under community Triton's interpreter, and compiled for GPUs
	$(PORTABLE)/python $(PYTEST) tests/test_launch.py tests/test_kernels.py tests/test_repair.py
	$(PORTABLE)/python $(PYTEST) --kernels compiled tests/gpu

sweep: .venv/ready ## compile the whole legal grid for every target; goes on where it stopped
	$(BIN)/python -m nsa.ascend sweep --out docs/evidence/sweep.json

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# threads that wait asleep: where other processes want the cores, spinning ones make all wait
train bench: export OMP_WAIT_POLICY := PASSIVE
train: .venv/ready ## the example on real text, with and without the compressed branch
	$(BIN)/python examples/train_lm.py --compare

bench: .venv/ready ## times against what people would use instead; ARGS="--quick", "--device npu", "--help"
	$(BIN)/python benchmarks/bench_compress.py $(ARGS)

.venv/ready: setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[ascend,dev]'
	@! $(BIN)/python -m pip show -q triton 2>/dev/null || { \
	  echo "torch brought community Triton along, which cannot stand beside triton-ascend: use torch's CPU build (README)"; \
	  rm -rf .venv; exit 1; }
	touch $@

.venv-portable/ready: setup.py pyproject.toml
	$(PYTHON) -m venv .venv-portable
	$(PORTABLE)/python -m pip install -q -e '.[cuda,dev]' triton==3.6.0
	touch $@

clean:
	rm -rf .venv .venv-portable
