#!/usr/bin/env bash
# PTX from kernels/*.cu, on any machine with python3, gcc and pip's index: no GPU and no CUDA toolkit.
#
#   kernels/build.sh                     build what changed, write ptx/NAME.smXX.ptx and ptx/MANIFEST
#   kernels/build.sh --check             build everything again and fail where a checked-in file differs
#   kernels/build.sh --check-hashes      fail where a source or an output is not the file in ptx/MANIFEST; no compiler, no network
#   kernels/build.sh --report [ARCH...]  registers, spills, shared memory and tensor instructions of every kernel, against its budget
#
# A kernel says in the first lines of its file, before any code:
#   // targets: 75 80 90a      one PTX file each; the first line of the file
#   // ptx-isa: 8.3            only where it needs more than its targets do, see isa_of
#   // max-registers: 128      --report fails above
#   // max-spill: 16           bytes a thread may spill; none without this line
#
# The .version in PTX decides the oldest driver that loads a file, and compilers write their own, newest number there. It is
# lowered to what the target needs, and the assembler of that age proves that it is enough: 7.0 is driver 450 (CUDA 11.0),
# 8.0 is driver 525 (CUDA 12.0). The tools are pinned by hash and lie under target/; set CUDA_WHEELS to a folder of wheels
# to install them without a network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
tools=$root/target/cuda-tools
cache=$root/target/ptx-cache
export LC_ALL=C TZ=UTC SOURCE_DATE_EPOCH=0
unset NVCC_PREPEND_FLAGS NVCC_APPEND_FLAGS CPATH C_INCLUDE_PATH CPLUS_INCLUDE_PATH
flags=(-O3 -std=c++17 --ptx -Werror all-warnings -diag-suppress 177)

pins() {
    cat <<'PINS'
nvidia-cuda-nvcc==13.0.88 --hash=sha256:56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03
nvidia-nvvm==13.0.88 --hash=sha256:c5f41ffeb6466944a026dfa5317d7d85355c119bbec279205d22f1869d1054e0
nvidia-cuda-crt==13.0.88 --hash=sha256:2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4
nvidia-cuda-runtime==13.0.96 --hash=sha256:7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
nvidia-cuda-nvdisasm==13.5.37 --hash=sha256:d3fdbdd49fa53e2e4aacd3db8259d052bd2b049ececdcb69e92e083c6728e7ca
PINS
}

# The assembler of CUDA 12.0 cannot share a folder with the one above: the wheels hold files of the same names.
old_pins() {
    cat <<'PINS'
nvidia-cuda-nvcc-cu12==12.0.140 --hash=sha256:958d54df87d0c0b7207e7fed403d6eeda0890a01cc44cfeaccf87c7f90e9b165
PINS
}

pip_install() { # folder, pins on standard input
    cat > "$tools/pins.txt"
    "$tools/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
        ${CUDA_WHEELS:+--no-index --find-links "$CUDA_WHEELS"} --target "$1" --requirement "$tools/pins.txt" >&2
}

install_tools() {
    local stamp
    stamp=$tools/installed-$( (pins && old_pins) | sha256sum | cut -c1-16)
    if [ ! -e "$stamp" ]; then
        rm -rf "$tools"
        mkdir -p "$tools"
        python3 -m venv "$tools/venv" >&2
        pins | pip_install "$tools/new"
        old_pins | pip_install "$tools/old"
        # Wheels do not keep the permission to run.
        chmod +x "$tools"/new/nvidia/cu13/bin/* "$tools"/new/nvidia/cu13/nvvm/bin/* "$tools"/old/nvidia/cuda_nvcc/bin/ptxas
        touch "$stamp"
    fi
    nvcc=$tools/new/nvidia/cu13/bin/nvcc
    ptxas=$tools/new/nvidia/cu13/bin/ptxas
    nvdisasm=$tools/new/nvidia/cu13/bin/nvdisasm
    old_ptxas=$tools/old/nvidia/cuda_nvcc/bin/ptxas
}

sources() { find kernels -maxdepth 1 -name '*.cu' | sort; }
headers() { find kernels -maxdepth 1 -name '*.cuh' | sort; }
setting() { sed -nE '1,12s|^// *'"$2"': *(.*[^ ]) *$|\1|p' "$1" | head -n 1; } # file, name
targets_of() { head -n 1 "$1" | sed -nE 's|^// *targets: *||p'; }

isa_of() { # file, arch
    local asked
    asked=$(setting "$1" ptx-isa)
    if [ -n "$asked" ]; then echo "$asked"; else case $2 in 7* | 80 | 86 | 87) echo 7.0 ;; *) echo 8.0 ;; esac; fi
}

# All that decides the PTX of a kernel: its text, every header, and this script with its pins and flags.
key_of() { # file, arch
    # shellcheck disable=SC2046
    { echo "$2" && sha256sum -- "$1" kernels/build.sh $(headers); } | sha256sum | cut -c1-32
}

compile() { # file, arch, output
    local tmp isa
    tmp=$(mktemp -d)
    isa=$(isa_of "$1" "$2")
    # From inside kernels/ and by a relative name: nothing of this machine gets into the output.
    (cd kernels && TMPDIR=$tmp "$nvcc" "${flags[@]}" -arch="compute_$2" "$(basename "$1")" -o "$tmp/new.ptx")
    # A hint of newer compilers that older assemblers do not know; the loads it stands before are right without it.
    sed -E -e '/^\/\/( |$)/d' -e '/^[[:space:]]*\.pragma "used_bytes_mask/d' -e "s/^\.version .*/.version $isa/" "$tmp/new.ptx" > "$tmp/out.ptx"
    "$ptxas" -arch="sm_$2" "$tmp/out.ptx" -o "$tmp/new.cubin"
    case $isa in
    [67].* | 8.0)
        "$old_ptxas" -arch="sm_$2" "$tmp/out.ptx" -o "$tmp/old.cubin" ||
            { echo "$1: the assembler of CUDA 12.0 refuses PTX ISA $isa for sm_$2" >&2 && return 1; }
        ;;
    esac
    mv "$tmp/out.ptx" "$3"
    rm -rf "$tmp"
}

compile_cached() { # file, arch, output
    local kept
    kept=$cache/$(key_of "$1" "$2").ptx
    if [ ! -e "$kept" ]; then
        compile "$1" "$2" "$kept.$$"
        mv "$kept.$$" "$kept"
    fi
    cp "$kept" "$3"
}

build_into() { # folder, compile or compile_cached
    local source targets arch
    mkdir -p "$1" "$cache"
    for source in $(sources); do
        targets=$(targets_of "$source")
        [ -n "$targets" ] || { echo "$source: the first line is not '// targets: ...'" >&2 && return 1; }
        for arch in $targets; do
            "$2" "$source" "$arch" "$1/$(basename "$source" .cu).sm$arch.ptx"
        done
    done
}

# In the form of sha256sum: this script, every source and every output.
manifest() { # folder of the outputs
    # shellcheck disable=SC2046
    sha256sum -- kernels/build.sh $(headers) $(sources)
    find "$1" -maxdepth 1 -name '*.ptx' -printf '%f\n' | sort | while read -r file; do
        printf '%s  ptx/%s\n' "$(sha256sum < "$1/$file" | cut -d ' ' -f 1)" "$file"
    done
}

write_all() {
    local new
    install_tools
    new=$(mktemp -d)
    build_into "$new" compile_cached
    manifest "$new" > "$new/MANIFEST"
    rm -f ptx/*.ptx
    find "$new" -type f -exec cp {} ptx/ \;
    rm -rf "$new"
    echo "$(find ptx -name '*.ptx' | wc -l) PTX files of $(sources | wc -l) kernels"
}

check() {
    local new file rc=0
    install_tools
    new=$(mktemp -d)
    build_into "$new" compile
    manifest "$new" > "$new/MANIFEST"
    for file in $( (cd "$new" && ls && cd "$root/ptx" && find . -name '*.ptx' -printf '%f\n') | sort -u); do
        cmp -s "$new/$file" "ptx/$file" || { echo "ptx/$file is stale: run kernels/build.sh" >&2 && rc=1; }
    done
    rm -rf "$new"
    [ "$rc" = 0 ] && echo "ptx/ is what kernels/ compile to"
    return "$rc"
}

check_hashes() {
    if ! diff <(manifest ptx) ptx/MANIFEST >&2; then
        echo "ptx/MANIFEST does not belong to these files (< here, > in the manifest): run kernels/build.sh" >&2
        return 1
    fi
    local source arch out
    for source in $(sources); do
        for arch in $(targets_of "$source"); do
            out=ptx/$(basename "$source" .cu).sm$arch.ptx
            [ -e "$out" ] || { echo "$out is missing: run kernels/build.sh" >&2 && return 1; }
        done
    done
    echo "$(sources | wc -l) kernels, $(find ptx -name '*.ptx' | wc -l) PTX files"
}

# What ptxas says of each entry, one line each: name, registers, bytes of spill, bytes of static shared memory.
entries() {
    awk -v quote="'" '
        /Compiling entry function/ { split($0, part, quote); name = part[2] }
        /spill stores/ { for (i = 1; i <= NF; i++) if ($i == "spill") spill += $(i - 2) }
        /Used [0-9]+ registers/ {
            shared = 0
            for (i = 1; i <= NF; i++) {
                if ($i == "registers,") registers = $(i - 1)
                if ($i ~ /^smem/) shared = $(i - 2)
            }
            print name, registers, spill + 0, shared
            spill = 0
        }' "$1"
}

count_in() { # file, entry, pattern: instructions of the entry that match
    awk -v entry=".text.$2:" -v pattern="$3" '
        /^\.text\./ { inside = ($1 == entry) }
        inside && /\/\*[0-9a-f]+\*\// && $0 ~ pattern { n++ }
        END { print n + 0 }' "$1"
}

report() {
    local tmp rc=0 file source own arch name registers spill shared most allowed
    install_tools
    tmp=$(mktemp -d)
    printf '%-56s %-7s %9s %6s %7s %6s %6s %6s %6s\n' entry target registers spill shared sass HMMA HGMMA TMA
    for file in ptx/*.ptx; do
        [ -e "$file" ] || continue
        own=${file##*.sm}
        own=${own%.ptx}
        source=kernels/$(basename "${file%.sm*}").cu
        most=$(setting "$source" max-registers)
        allowed=$(setting "$source" max-spill)
        for arch in ${*:-$own}; do
            if ! "$ptxas" -v -O3 -arch="sm_$arch" "$file" -o "$tmp/cubin" > "$tmp/log" 2>&1; then
                head -n 1 "$tmp/log"
                continue
            fi
            # C75xx: wgmma is serialised, which is slow, or setmaxnreg is ignored, which may be worse.
            if grep -E 'C75[0-9][0-9]|serialized|setmaxnreg.*ignored' "$tmp/log"; then rc=1; fi
            "$nvdisasm" -c "$tmp/cubin" > "$tmp/sass"
            while read -r name registers spill shared; do
                printf '%-56s sm_%-4s %9s %6s %7s %6s %6s %6s %6s\n' "$(basename "$file" .ptx):$name" "$arch" "$registers" \
                    "$spill" "$shared" "$(count_in "$tmp/sass" "$name" .)" "$(count_in "$tmp/sass" "$name" HMMA)" \
                    "$(count_in "$tmp/sass" "$name" HGMMA)" "$(count_in "$tmp/sass" "$name" UTMALDG)"
                if [ "$spill" -gt "${allowed:-0}" ]; then
                    echo "$source: $name spills $spill bytes, ${allowed:-0} are allowed" >&2
                    rc=1
                fi
                if [ "$registers" -gt "${most:-255}" ]; then
                    echo "$source: $name takes $registers registers, ${most:-255} are allowed" >&2
                    rc=1
                fi
            done < <(entries "$tmp/log")
        done
    done
    rm -rf "$tmp"
    return "$rc"
}

case ${1:-} in
"") write_all ;;
--check) check ;;
--check-hashes) check_hashes ;;
--report) shift && report "$@" ;;
*) sed -n '4,7s/^# *//p' kernels/build.sh && exit 2 ;;
esac
