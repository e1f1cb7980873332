#!/usr/bin/env bash
# Makes one folder to carry to a GPU machine that has no network:
#
#     bench/carry.sh FOLDER [PYTHON]
#
# PYTHON (default: python3.12) is of the version that the machine has. There, `bash FOLDER/run.sh
# --minutes 14` installs the wheels beside itself and runs bench/gpu.py; everything that comes of it
# is FOLDER/gpu.jsonl. The machine is expected to have torch, triton, numpy, safetensors, pillow,
# rich and pytest; timm and transformers are measured where they are.
set -euo pipefail
folder=${1:?the folder to make} python=${2:-python3.12}
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -e "$folder" ]; then
  echo "carry.sh: $folder is there already" >&2
  exit 2
fi
mkdir -p "$folder/wheels"
folder=$(cd "$folder" && pwd)
# what is committed, without the golden vectors, which no device test reads
git -C "$root" archive HEAD -- bench configs engine kernels tests pyproject.toml CMakeLists.txt \
  README.md LICENSE ':!tests/golden' ':!tests/mutants' | tar -x -C "$folder"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder/wheels" "$root"
"$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder/wheels" \
  simplejpeg jsonargparse docstring-parser typeshed-client importlib-resources pyyaml hypothesis \
  sortedcontainers attrs
cat > "$folder/run.sh" <<'RUN'
#!/usr/bin/env bash
# Runs bench/gpu.py with the wheels of this folder; its arguments are passed on.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
if [ ! -d "$here/site" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --target "$here/site" "$here"/wheels/*.whl
fi
cd "$here"
export PYTHONPATH="$here/site:$here:$here/tests${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" bench/gpu.py --output "$here/gpu.jsonl" "$@"
RUN
du -sh "$folder" | cut -f 1
