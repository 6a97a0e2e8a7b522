#!/usr/bin/env bash
# Checks and measures everything that needs a GPU, in one visit to a machine that has one. Nothing is built there: it needs
# no cargo, no network and no CUDA toolkit, only the driver; PyTorch, compute-sanitizer and ncu are used where they are.
#
#   benches/gpu_run.sh prepare      where the sources are: builds, and packs all that travels into .gpu/ (which git ignores)
#   bash .gpu/gpu_run.sh check      on the machine with the GPU: every kernel and whole networks on the card; sanitizers
#   bash .gpu/gpu_run.sh bench      ours, PyTorch, ours again; a table; our layers by every variant; whole predictions
#   bash .gpu/gpu_run.sh visit      check without sanitizers, while PyTorch compiles; then bench
#   bash .gpu/gpu_run.sh train      training steps: ours, PyTorch, ours again; every training kernel on the card before
#   bash .gpu/gpu_run.sh real       trainings from disk: how busy they keep the card, and the Dice of the processor's and the card's
#   bash .gpu/gpu_run.sh prof       what ncu says of the kernels of one forward pass
#
# Logs and tables go to $OUT [gpu-results]. MODELS="small base" names the networks [small base large huge], LAYERS those
# whose layers are held against PyTorch's [base], PATCH their window [128], READY the seconds that PyTorch may take to get
# ready [240], LIMIT those that all of it may take [540]. Each step has a time limit of its own and the next one follows after
# a failure, so that one bad kernel does not cost the visit. Clocks, power and the card's modes stay as they are.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
models=${MODELS:-small base large huge}
layers=${LAYERS:-base}
patch=${PATCH:-128}
ready=${READY:-240}
limit=${LIMIT:-540}
results=${OUT:-gpu-results}

prepare() {
    cd "$here/.."
    # Stale PTX is not worth measuring.
    kernels/build.sh --check-hashes
    rm -rf .gpu
    mkdir -p .gpu/bin
    cargo build --release --locked --bin stunet
    cargo test --release --locked --test all --no-run --message-format=json | python3 -c '
import json, sys
for line in sys.stdin:
    m = json.loads(line)
    if m.get("executable") and m["target"]["name"] == "all" and m["profile"]["test"]:
        print(m["executable"])' > .gpu/tests
    cp "${CARGO_TARGET_DIR:-target}/release/stunet" .gpu/bin/stunet
    cp "$(cat .gpu/tests)" .gpu/bin/tests
    rm .gpu/tests
    strip .gpu/bin/stunet .gpu/bin/tests
    cp benches/gpu_run.sh benches/bench_torch.py .gpu/
    {
        git rev-parse HEAD
        git diff HEAD | sha256sum
    } > .gpu/commit
    local binary
    for binary in .gpu/bin/*; do
        # The driver is looked for at run time: a program that links it would not start without.
        if ldd "$binary" | grep -E 'libcuda|libnv|not found'; then
            echo "$binary needs a library that may not be there" >&2
            return 1
        fi
        echo "$binary needs $(objdump -T "$binary" | grep -oE 'GLIBC_[0-9.]+' | sort -uV | tail -n 1)"
    done
    du -sh .gpu
}

left() { echo $((limit - SECONDS)); }

# Runs a command under a limit; what it says goes to a log, and how it ended to the summary.
step() { # seconds, name, command...
    local seconds=$1 name=$2 begin=$SECONDS rc=0
    shift 2
    if [ "$(left)" -lt 10 ]; then
        echo "$name: no time left" | tee -a "$results/summary.txt"
        return 0
    fi
    [ "$seconds" -le "$(left)" ] || seconds=$(left)
    timeout -k 5 "$seconds" "$@" > "$results/$name.log" 2>&1 || rc=$?
    printf '%-28s rc %-3s %4s s of %s\n' "$name" "$rc" $((SECONDS - begin)) "$seconds" | tee -a "$results/summary.txt"
    [ "$rc" = 0 ] || { failed=1 && tail -n 15 "$results/$name.log" | cut -c1-300; }
}

begin() {
    mkdir -p "$results"
    results=$(cd "$results" && pwd)
    : > "$results/summary.txt"
    failed=0
    # The driver's own, so that a second start does not assemble again; here, so that nothing is left elsewhere.
    export CUDA_CACHE_PATH=$results/cache
    chmod +x "$here"/bin/*
    {
        cat "$here/commit"
        nvidia-smi
        nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv
        "$here/bin/stunet" info
        ldd --version | head -n 1
        uname -r
        python3 -c 'import torch; print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version())'
    } > "$results/facts.txt" 2>&1 || true
    grep -E '^cuda' "$results/facts.txt" || true
}

end() {
    rm -rf "$results/cache"
    echo "results in $results after $SECONDS s"
    return "$failed"
}

note() { echo "$1" | tee -a "$results/summary.txt"; }

kernels() {
    # The test asks for a card, so that a machine on which none is found does not look like one on which all is well.
    local run=(env STUNET_GPU=require RUST_BACKTRACE=0)
    local tests=("$here/bin/tests" --nocapture --test-threads 1 --exact kernels::context::ptx_on_a_card)
    # A process each: after a fault of one kernel the driver lets the process run no other. Last what may wait for ever.
    local part words
    for part in relayout train conv3d transpose3d moments instance_norm head_labels aggregate resample probe runtime graph devices network library STU-Net hopper tma; do
        case $part in
        hopper) words="hopper -tma" ;;
        tma) words=tma ;;
        train) words="train -hopper -tma" ;;
        *) words="$part -train -hopper -tma" ;;
        esac
        step 90 "kernels_$part" "${run[@]}" STUNET_GPU_TESTS="$words" "${tests[@]}"
    done
    step 60 forward "$here/bin/stunet" bench forward --device cuda --model small --patch 32 --runs 1
    step 60 conv3d_all "$here/bin/stunet" bench conv3d --device cuda --model small --patch 32 --runs 1 --all --json
    step 60 train_step "$here/bin/stunet" bench train-step --device cuda --model small --patch 32 --runs 1
    step 60 predict "$here/bin/stunet" bench predict --device cuda --model small --patch 64 --shape 80 96 128 --tta --runs 1
}

sanitizers() {
    if ! command -v compute-sanitizer > /dev/null; then
        note "no compute-sanitizer"
        return 0
    fi
    # Tens of times slower: of each family the smallest. Reads of what nothing wrote are found without: it is no number.
    local tool small="batch_in_f16 in_parts repeated one_voxel residual first transpose3d tensor in_place equal_scores window aggregate_scores probe_products"
    for tool in memcheck racecheck synccheck; do
        step 120 "$tool" env STUNET_GPU=require RUST_BACKTRACE=0 STUNET_GPU_TESTS="$small" \
            compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 \
            "$here/bin/tests" --nocapture --test-threads 1 --exact kernels::context::ptx_on_a_card
    done
}

# PyTorch's processes by model.
declare -A torch=()

# Starts one for every model, which compiles and then waits to be told to go.
start_torch() {
    # Memory that another process holds is none of a mode's, and threads that compile leave some to the checks.
    export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=$results/cache/inductor TORCHINDUCTOR_COMPILE_THREADS=3
    if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
        note "no PyTorch with CUDA: only ours"
        return 0
    fi
    trap 'kill "${torch[@]}" 2> /dev/null || true' EXIT
    local model
    for model in $models; do
        rm -f "$results/go_$model"
        timeout -k 5 "$limit" python3 "$here/bench_torch.py" net --model "$model" --patch "$patch" --limit 60 \
            --compile-limit $((ready > 60 ? ready - 30 : 30)) --go "$results/go_$model" > "$results/torch_net_$model.log" 2>&1 &
        torch[$model]=$!
    done
}

# Waits until all of them are ready. What is not by then would disturb the others.
await_torch() {
    local model until=$((SECONDS + ready)) begin=$SECONDS
    for model in "${!torch[@]}"; do
        until grep -q '"ready"' "$results/torch_net_$model.log"; do
            if ! kill -0 "${torch[$model]}" 2> /dev/null || [ "$SECONDS" -ge "$until" ]; then
                note "torch_net_$model did not get ready"
                tail -n 5 "$results/torch_net_$model.log" | cut -c1-300
                kill "${torch[$model]}" 2> /dev/null || true
                unset "torch[$model]"
                failed=1
                break
            fi
            sleep 0.2
        done
    done
    [ "${#torch[@]}" = 0 ] || note "waited $((SECONDS - begin)) s for PyTorch"
}

# Has a model's process time what it made ready, until it ends.
torch_net() { # model
    local pid=${torch[$1]:-} rc=0
    [ -n "$pid" ] || return 0
    touch "$results/go_$1"
    step 90 "torch_wait_$1" tail --pid="$pid" -s 0.1 -f /dev/null
    kill "$pid" 2> /dev/null || true
    wait "$pid" || rc=$?
    unset "torch[$1]"
    if [ "$rc" != 0 ]; then
        note "torch_net_$1 rc $rc"
        tail -n 5 "$results/torch_net_$1.log" | cut -c1-300
        failed=1
    fi
}

measures() {
    local model what has_torch=${#torch[@]}
    for model in $models; do
        what=("$here/bin/stunet" bench forward --device cuda --model "$model" --patch "$patch" --runs 20 --json)
        step 60 "ours_1_$model" "${what[@]}"
        torch_net "$model"
        step 60 "ours_2_$model" "${what[@]}"
    done
    for model in $layers; do
        what=(--model "$model" --patch "$patch")
        # Every variant of every layer, against the card's roofline.
        step 60 "variants_$model" "$here/bin/stunet" bench conv3d --device cuda "${what[@]}" --all --json
        step 60 "ours_norm_$model" "$here/bin/stunet" bench instance-norm --device cuda "${what[@]}" --json
        if [ "$has_torch" != 0 ]; then
            step 60 "torch_layers_$model" python3 "$here/bench_torch.py" layers "${what[@]}" --limit 50
            step 90 "torch_norm_$model" python3 "$here/bench_torch.py" norm "${what[@]}" --limit 60 --compile-limit 30
        fi
    done
    for model in $models; do
        # Windows one after the other, as a prediction runs them: sums on the card, passes as graphs.
        step 60 "predict_$model" "$here/bin/stunet" bench predict --device cuda --model "$model" --patch "$patch" --json
        case " $layers " in
        *" $model "*) ;;
        *) step 60 "variants_$model" "$here/bin/stunet" bench conv3d --device cuda --model "$model" --patch "$patch" --all --json ;;
        esac
    done
    python3 "$here/bench_torch.py" table --results "$results" | tee "$results/table.md"
}

check() {
    begin
    kernels
    sanitizers
    end
}

bench() {
    begin
    start_torch
    await_torch
    measures
    end
}

visit() {
    begin
    start_torch
    kernels
    await_torch
    measures
    end
}

train() {
    begin
    step 120 kernels_train env STUNET_GPU=require RUST_BACKTRACE=0 STUNET_GPU_TESTS="train" \
        "$here/bin/tests" --nocapture --test-threads 1 --exact kernels::context::ptx_on_a_card
    local model what
    for model in $models; do
        what=("$here/bin/stunet" bench train-step --device cuda --model "$model" --patch "$patch" --runs 20 --json)
        step 60 "train_1_$model" "${what[@]}"
        if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
            step 150 "torch_step_$model" python3 "$here/bench_torch.py" step --model "$model" --patch "$patch" --limit 60 --compile-limit 60
        fi
        step 60 "train_2_$model" "${what[@]}"
    done
    python3 "$here/bench_torch.py" table --results "$results" | tee "$results/table.md"
    end
}

# What a file of summary.json's says of the foreground.
dice() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["foreground_mean"]["Dice"])' "$1"; }

real() {
    begin
    local stunet=$here/bin/stunet cores=() name busy model=${models%% *} work=$results/cache/work
    [ "$models" != "small base large huge" ] || model=base
    mkdir -p "$work"/{raw,preprocessed,results}
    export nnUNet_raw=$work/raw nnUNet_preprocessed=$work/preprocessed nnUNet_results=$work/results
    # Two processor cores, as a card of a full machine has.
    if command -v taskset > /dev/null; then cores=(taskset -c 0,1); fi
    step 60 phantoms "$stunet" phantoms -o "$nnUNet_raw/Dataset900_Phantom" -n 12 --shape 160 144 168 --no-progress
    step 90 planned "$stunet" plan-and-preprocess -d 900 -c 3d_fullres
    for name in processor card; do
        local options=(-d 900 -c 3d_fullres -f all --device cuda --network "stunet-$model" --patch "$patch" "$patch" "$patch"
            --batch 2 --epochs 1 --iterations 100 --val-iterations 1 --no-val --overwrite)
        [ "$name" = processor ] || options+=(--augment-on-device)
        nvidia-smi --query-gpu=utilization.gpu --format=csv,noheader,nounits -lms 100 > "$results/busy_$name.csv" 2> /dev/null &
        busy=$!
        step 90 "augmented_by_$name" "${cores[@]}" "$stunet" train "${options[@]}"
        kill "$busy" 2> /dev/null || true
        # The middle half: neither the start nor what comes after the steps.
        note "augmented by the $name: the card is busy $(awk '{ v[NR] = $1 } END { for (i = int(NR / 4) + 1; i <= int(NR * 3 / 4); i++) { s += v[i]; n++ } if (n) printf "%.1f %%", s / n }' "$results/busy_$name.csv")"
        tail -n 1 "$nnUNet_results"/Dataset900_Phantom/*/fold_all/metrics.jsonl > "$results/epoch_$name.json" || true
    done
    step 30 small_phantoms "$stunet" phantoms -o "$nnUNet_raw/Dataset901_Phantom" -n 12 --shape 56 44 60 --spacing 5 5 5 --no-progress
    step 30 small_planned "$stunet" plan-and-preprocess -d 901 -c 3d_fullres
    for name in cuda cpu; do
        nnUNet_results=$work/$name
        step 180 "trained_on_$name" "$stunet" train -d 901 -c 3d_fullres -f 0 --device "$name" --precision f32 --network stunet-tiny \
            --patch 32 32 32 --batch 2 --epochs 20 --iterations 50 --val-iterations 4 --seed 1
        note "trained on $name: Dice $(dice "$work/$name"/Dataset901_Phantom/*/fold_0/validation/summary.json)"
    done
    end
}

prof() {
    begin
    # A page of text for each kernel. What the card is measured with comes first and is not of interest; of the rest, skips and
    # counts are of launches that match. A pass has 60 to 120 of them, more the deeper the network.
    step 300 ncu ncu --clock-control none --target-processes all --launch-skip "${SKIP:-0}" --launch-count "${COUNT:-80}" \
        --kernel-name 'regex:^(conv|head|moments|instance|relayout|aggregate|resample)' \
        --section SpeedOfLight --section Occupancy --section MemoryWorkloadAnalysis --section WarpStateStats \
        --section SchedulerStats --section LaunchStats \
        "$here/bin/stunet" bench forward --device cuda --model "${models%% *}" --patch "$patch" --runs 1
    grep -E '^  [a-zA-Z_0-9]+ .*Context|Duration|Throughput|Registers Per|Achieved Occ|Stall|Bank' "$results/ncu.log" | cut -c1-110 || true
    end
}

case ${1:-} in
prepare) prepare ;;
check) check ;;
bench) bench ;;
visit) visit ;;
train) train ;;
real) real ;;
prof) prof ;;
*) sed -n '2,17s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
