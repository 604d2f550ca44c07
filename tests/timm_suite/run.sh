#!/usr/bin/env bash
# Runs timm's own, unmodified tests/test_models.py on all models of timm_attn. The tests are those of the installed
# timm: its sdist, taken by pip, unpacked outside the checkout and away from the sdist's own timm/.
#
#   tests/timm_suite/run.sh                       # all models, two processes
#   TIMM_PLUGIN=injected_models TIMM_FILTER="in_*" tests/timm_suite/run.sh     # combinations of `injected`
#   TIMM_FILTER='cbam_*,bam_*' tests/timm_suite/run.sh -n 0 -x
#
# Needs pytest and pytest-xdist. PYTHON names the interpreter. Fails when no model matched or a timm name was taken.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$(command -v "${PYTHON:-python}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

version=$("$python" -c 'import timm; print(timm.__version__)')
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary timm --dest sdist "timm==$version"
mkdir suite
tar -xzf sdist/timm-"$version".tar.gz -C suite --strip-components=1 "timm-$version/tests" "timm-$version/pyproject.toml"
cd suite

export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
"$python" -c 'import timm_attn' 2> "$work/import.log" || export PYTHONPATH="$PYTHONPATH:${here%/tests/timm_suite}"
# One thread for each of the processes. Tests of pretrained weights download them; tests/weights covers those.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TIMM_PLUGIN=${TIMM_PLUGIN:-timm_attn}
"$python" -m pytest -c pyproject.toml -p timm_suite_plugin -q -n 2 -k 'not pretrained' "$@" tests/test_models.py
