# Table 1 and what else fits, on a GPU that is lent for minutes and has no network.
#
#     OUT=folder bash benchmarks/lent.sh first|next SECONDS [records.tgz]
#
# Without .git here, pass UNBACKDOOR_REVISION too. Run it in the repository's root. .lent/ (ignored) holds wheels of what the machine lacks, in whl/, and the
# parquet files of CIFAR-10, in cifar10/. `first` holds the device against the CPU, measures its speed and how
# many processes share it best, then begins; `next` only begins, or looks on. The grids run in a session of their
# own, so that they go on between two commands. Records, logs and no weights come to OUT once a minute; a
# fresh machine goes on from them, but trains victims anew.
began=$SECONDS what=$1 limit=${2:-575} earlier=$3
OUT=$(realpath -m "${OUT:?a folder}") && mkdir -p "$OUT"
here=/dev/shm/lent # in memory: writes need not wait for a disk
[ "$(df --output=avail /dev/shm | tail -1)" -gt 4000000 ] || here=/tmp/lent
copy=$here/repository records=$here/bench data=cifar10:$here/repository/.lent/cifar10
mkdir -p "$here" "$records"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=3 OPENBLAS_NUM_THREADS=3 PYTHONPATH=$here/site:$copy
: "${UNBACKDOOR_REVISION:=$(git describe --always --abbrev=40 --dirty=-changed 2>/dev/null)}"
export UNBACKDOOR_REVISION

left() { echo $((limit - (SECONDS - began))); }
bring() {
    tar czf "$OUT/records.tgz" -C "$here" --exclude='*.safetensors' --exclude='*.part' --exclude=running bench
    cp "$here"/*.log "$here"/speed.json "$OUT"/ 2>/dev/null
}
trap bring EXIT

if [ ! -d "$copy" ]; then # a fresh machine
    python3 -m pip install -q --no-index --no-deps --target "$here/site" .lent/whl/*.whl || exit 1
    mkdir -p "$copy/results"
    cp -r unbackdoor grids benchmarks tests .lent "$copy/"
    cp -r results/victims "$copy/results/"
    [ -z "$earlier" ] || tar xzf "$earlier" -C "$here"
fi
cd "$copy" || exit 1

if [ "$what" = first ]; then
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
    timeout 150 python3 benchmarks/check_device.py 2>&1 | tee "$here/check.log"
    timeout 120 python3 benchmarks/run.py --data "$data" --networks cifar/resnet18 --budget 60 \
        --only views search training victims --out "$here/speed.json" 2>&1 | tee "$here/speed.log"
    for processes in 1 3 6; do
        moment=$(($(date +%s) + 16))
        for number in $(seq $processes); do
            python3 benchmarks/rate.py $moment 6 >"$here/rate.$processes.$number" &
        done
        wait
        echo "$processes $(cat "$here"/rate.$processes.* | awk '{sum += $1} END {printf "%d", sum}')"
    done | tee "$here/rate.log" # processes, and training steps a second of all
    awk '$2 > 1.1 * most {most = $2; best = $1} END {print best}' "$here/rate.log" >"$here/workers"
fi
if ! kill -0 "$(cat "$here/pid" 2>/dev/null)" 2>/dev/null; then # it has ended, or never begun
    workers=$(cat "$here/workers" 2>/dev/null)
    run="python3 -m unbackdoor bench run --data $data --results $records --workers ${workers:-4}"
    setsid nohup bash -c "for tables in 1 [28] 7; do $run grids/table\$tables-h200.toml --seeds 0; done" \
        >>"$here/grids.log" 2>&1 </dev/null &
    echo $! >"$here/pid"
fi
while [ "$(left)" -gt 12 ]; do
    sleep $(($(left) > 72 ? 60 : $(left) - 11))
    echo "$(date +%T) $(find "$records" -maxdepth 1 -name '*.json' | wc -l) records," \
        "$(find "$records/failed" -name '*.json' 2>/dev/null | wc -l) failed;" \
        "$(nvidia-smi --query-gpu=utilization.gpu,memory.used --format=csv,noheader)"
    bring
done
tail -n 30 "$here/grids.log"
grep -h '"error"' "$records"/failed/*.json 2>/dev/null | head -5
