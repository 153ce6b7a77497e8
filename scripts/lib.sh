# shellcheck shell=bash
# Sourced by the scripts beside it: finds a Python that really runs and keeps a virtual
# environment in step with pyproject.toml and constraints/.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf '%s\n' "$*" >&2; }

die() {
    say "error: $*"
    exit 2
}

# A name on PATH proves nothing: version managers leave stubs that only print an error, and some
# distributions ship a Python that cannot make virtual environments. So every candidate is run.
python_is() { # COMMAND VERSION
    local found
    found="$("$1" -c 'import sys, ensurepip, venv; print("%d.%d" % sys.version_info[:2])' \
        2>/dev/null </dev/null)" && [[ "$found" == "$2" ]]
}

find_python() { # VERSION... (the first that is there wins); prints the command
    local version candidate
    for version in "$@"; do
        for candidate in "python$version" python3 python \
            "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
            if python_is "$candidate" "$version"; then
                printf '%s\n' "$candidate"
                return 0
            fi
        done
    done
    return 1
}

pip_install() { # DIR ARGUMENT...; one more try when the network failed
    local dir="$1" log attempt
    shift
    log="$dir/pip.log"
    for attempt in 1 2; do
        if (cd "$ROOT" && "$dir/bin/python" -m pip install -q --disable-pip-version-check "$@") \
            >"$log" 2>&1 </dev/null; then
            return 0
        fi
        if [[ "$attempt" == 1 ]] && grep -Eiq \
            'timed? ?out|connection (broken|refused|reset|aborted)|name resolution|unreachable' \
            "$log"; then
            say "setup: the network failed, trying once more"
            continue
        fi
        break
    done
    tail -n 30 "$log" >&2
    die "pip could not install the dependencies into $dir (its messages stand above)"
}

# The page is tested in a real browser. Playwright's own would come from outside the registries.
ensure_chromium() {
    [[ ! -x /usr/bin/chromium && "$(id -u)" == 0 ]] && command -v apt-get >/dev/null || return 0
    say "setup: installing chromium, once, for the tests of the page"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium; } \
        >/dev/null 2>&1 </dev/null ||
        say "setup: chromium could not be installed: the tests of the page are skipped"
}

# Groups that share a queue are tested on a real Postgres; the tests start one of their own.
ensure_postgres() {
    compgen -G "/usr/lib/postgresql/*/bin/initdb" >/dev/null && return 0
    [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null || return 0
    say "setup: installing postgresql, once, for the tests of the shared queue"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq postgresql; } \
        >/dev/null 2>&1 </dev/null ||
        say "setup: postgresql could not be installed: the tests of the shared queue are skipped"
}

# What the tests need on the stacks of a GCU, where neither linters nor the server are installed.
TEST_TOOLS=(pytest pytest-xdist hypothesis ninja jsonschema shtab wheel "setuptools>=77")

requirements_of() { # STACK DIR; fills the array REQUIREMENTS
    case "$1" in
        current)
            REQUIREMENTS=(-e ".[dev]")
            # The build that this stack is tested with; elsewhere pip picks what the system has.
            if [[ "$(uname -s)-$(uname -m)" == Linux-x86_64 ]] && python_is "$2/bin/python" 3.11; then
                REQUIREMENTS=("torch==2.13.0" "${REQUIREMENTS[@]}")
            fi
            ;;
        gcu2.3)
            REQUIREMENTS=(-c constraints/gcu2.3.txt "torch==2.3.0" -e . "${TEST_TOOLS[@]}")
            ;;
        gcu2.10)
            REQUIREMENTS=(-c constraints/gcu2.10.txt "torch==2.10.0" -e . "${TEST_TOOLS[@]}")
            ;;
    esac
}

# Scripts inside a virtual environment carry its path, so one that was copied elsewhere is made anew.
identity_of() { # DIR STACK PYTHON
    printf '%s %s %s' "$2" "$("$3" -c 'import platform; print(platform.python_version())')" "$1"
}

checksum_of_requirements() { # PYTHON
    cat "$ROOT/pyproject.toml" "$ROOT/scripts/lib.sh" "$ROOT/constraints/"*.txt |
        "$1" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

# Triton is optional and large: 286 MB to fetch, 1 GB on disk. Without a GPU only the tests of its
# kernels need it, and they are skipped where it cannot be had.
ensure_triton() { # NAME; NAME is a virtual environment that is there
    local dir="$ROOT/$1" said
    [[ "$(uname -s)" == Linux && ! -e "$dir/no-triton" ]] || return 0
    if "$dir/bin/python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("triton"))'; then
        return 0
    fi
    say "setup: installing triton, once; without it the tests of its kernels are skipped"
    if ! said="$("$dir/bin/python" -m pip install -q --disable-pip-version-check --no-deps \
        --retries 1 --timeout 20 'triton>=3.0' 2>&1 </dev/null)"; then
        say "setup: no triton (${said##*$'\n'}); remove $1/no-triton to try again"
        touch "$dir/no-triton"
    fi
}

ensure_venv() { # NAME STACK (current, gcu2.3 or gcu2.10); returns with ROOT/NAME/bin ready to use
    local dir="$ROOT/$1" stack="$2" versions python identity checksum
    case "$stack" in
        current) versions=(3.11 3.12 3.10) ;;
        gcu2.3) versions=(3.10) ;;
        gcu2.10) versions=(3.12) ;;
        *) die "unknown stack '$stack': it is current, gcu2.3 or gcu2.10" ;;
    esac
    python="$(find_python "${versions[@]}")" || die \
        "found no Python that can make a virtual environment, on PATH or under pyenv: install one" \
        "of these with its venv module and run this again: ${versions[*]}"
    identity="$(identity_of "$dir" "$stack" "$python")"
    checksum="$(checksum_of_requirements "$python")"
    if [[ "$(cat "$dir/stamp" 2>/dev/null)" == "$identity"$'\n'"$checksum" ]]; then
        return 0
    fi
    if [[ "$(head -n 1 "$dir/stamp" 2>/dev/null)" == "$identity" ]]; then
        say "setup: bringing $1 up to date, as the requirements have changed"
    else
        # --clear would empty what a link leads to.
        [[ ! -L "$dir" ]] || die "$1 is a link to $(readlink -f "$dir"), which is set up otherwise:" \
            "remove the link, and this installs an environment of its own"
        say "setup: installing into $1 with $("$python" --version), once; this takes some minutes"
        "$python" -m venv --clear "$dir" || die "$python made no virtual environment in $dir"
    fi
    requirements_of "$stack" "$dir"
    pip_install "$dir" "${REQUIREMENTS[@]}"
    # Last, so that an installation that was cut off is begun again.
    printf '%s\n%s\n' "$identity" "$checksum" >"$dir/stamp"
}
