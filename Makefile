# Each target works alone on a fresh machine: Python >= 3.10 and a C++ compiler are enough, a GPU is not needed.
#   make demo    data, training, evaluation, comparison, report: runs/demo/report.html
#   make quick   the same path with fewer steps, in minutes: runs/quick/report.html
#   make test    the tests
#   make bench   our models beside transformers and llama.cpp, in an hour or more: runs/bench/peers.md
#   make sanitize  the kernels' tests under the sanitizers for addresses and undefined behaviour
#   make cuda    compiles and links the CUDA kernels for sm_90a where nvcc is, and tells their registers and spills; no GPU
#   make cuda-all  the same for sm_80, sm_90 and sm_90a
#   make gpu     builds, tests and times the CUDA kernels and the models on a GPU: benchmarks/results
#   make gpu-peers fetches the archives of mamba_ssm, causal_conv1d and fla that make gpu measures beside
#   make wide    the same tests, on a machine without AVX-512, of the kernels for it in other instructions
#   make soak    lets 200 clients come and go, kills training thirty times, and says what was lost: runs/soak
#   make setup   only .venv (the other targets call it; a second call does nothing)
#   make clean   removes build products and caches; keeps .venv and runs/

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.cobra-ready

.PHONY: demo quick test bench soak cuda cuda-all gpu gpu-peers sanitize wide setup clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	@$(PY) -m eval demo --output runs/demo

quick: $(STAMP)
	@$(PY) -m eval demo --quick --output runs/quick

# A process for each core, a thread for each process: most tests are too small for more.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder tests

soak: $(STAMP)
	@$(PY) -m tests.cobra.serve_soak --clients 200 --seconds 120 --output runs/soak/serve.json
	@$(PY) -m tests.train.soak --kills 30 --output runs/soak/train.json

# llama.cpp is compiled for this machine, which takes a few minutes.
bench: $(STAMP)
	@$(PY) -c 'import gguf, llama_cpp' 2>/dev/null || $(PY) -m pip install --progress-bar on "llama-cpp-python>=0.3.16" gguf -c constraints.txt
	@$(PY) -m eval efficiency --peers transformers,llama.cpp --output runs/bench/peers.json

cuda: $(STAMP)
	@$(PY) -m eval cuda

cuda-all: $(STAMP)
	@$(PY) -m eval cuda --archs "8.0;9.0;9.0a" --output build/cuda-all

gpu: $(STAMP)
	@PYTHON=$(abspath $(PY)) bash benchmarks/gpu.sh

# Sources, built by the part `peers` on the machine with the GPU; fla, and einops, which they import, are Python alone.
gpu-peers: $(STAMP)
	@$(PY) -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: --dest benchmarks/peers \
		mamba-ssm==2.3.2.post1 causal-conv1d==1.7.0
	@$(PY) -m pip download --quiet --no-deps --only-binary :all: --dest benchmarks/peers einops==0.8.2 fla-core==0.6.0
	@du -ch benchmarks/peers/*

# In a copy of the tree, because such kernels slow everything down. $(1): its folder, $(2): flags of compiler and linker.
define build_copy
	@rm -rf $(1) && mkdir -p $(1) && cp -r cobra vision_scan csrc tests setup.py pyproject.toml README.md $(1)
	@rm -f $(1)/vision_scan/_C*.so
	@cd $(1) && COBRA_KERNEL_FLAGS="-O1 $(2)" LDFLAGS="$(filter -fsanitize%,$(2))" $(abspath $(PY)) setup.py build_ext --inplace
endef
KERNEL_TESTS := tests/vision_scan/test_compiled.py tests/vision_scan/test_ops_update.py \
	tests/cobra/test_decode.py tests/cobra/test_decode_calls.py tests/cobra/test_quantize.py

# Leaks are Python's own; NaN and infinity are meant to pass through divisions.
sanitize: $(STAMP)
	$(call build_copy,build/sanitized,-fsanitize=address -fsanitize=undefined -fno-sanitize=float-divide-by-zero)
	@cd build/sanitized && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 $(abspath $(PY)) -m pytest -q $(KERNEL_TESTS)

wide: $(STAMP)
	$(call build_copy,build/wide,-DEMULATE_AVX512)
	@cd build/wide && $(abspath $(PY)) -c 'import torch, vision_scan; assert torch.ops.vision_scan_cpu.instruction_set() == "avx512"'
	@cd build/wide && $(abspath $(PY)) -m pytest -q -k "not avx2" $(KERNEL_TESTS)

setup: $(STAMP)

# The stamp is written last, so an interrupted set-up is taken up again, in the same .venv.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.h csrc/cpu/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python >= 3.10 is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); name another one: make PYTHON=python3.12" >&2; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: '$(PYTHON) -m venv' does not work here; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@echo "Setting up $(VENV): the first time takes a few minutes, most of it for torch."
	@$(PY) -m pip install --progress-bar on --upgrade pip
	@# Without build isolation setup.py sees the torch that it builds against, and deepspeed finds setuptools: both must be there first.
	@$(PY) -m pip install --progress-bar on setuptools wheel -c constraints.txt "torch" "torchvision"
	@DS_BUILD_OPS=0 $(PY) -m pip install --progress-bar on --no-build-isolation -e ".[all,dev]" -c constraints.txt
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find cobra vision_scan train eval csrc tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
