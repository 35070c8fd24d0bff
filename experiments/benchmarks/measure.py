"""Everything that record.py gathers, one `attnlab bench` after the other, in about an hour.

python experiments/benchmarks/measure.py [NAME...]

Leaves runs/benchmarks/NAME/bench.jsonl. The machine must have nothing else to do.
"""

import subprocess
import sys

PAIRS = "softmax,window,block,fixed,linear,favor,lsh,routing,hierarchical,gated_delta"
BOTH_WAYS = "--attention=linformer,nystrom --config.model.causal=false"
CONSTANT = (
    "window,block,linear,gated_delta,favor,routing,transformer_xl,compressive,infini,gated_slots"
)
COMMANDS = {
    "peers_1": f"--attention={PAIRS} --lengths=4k --peers --threads=1 --repeats=15",
    "peers_2": f"--attention={PAIRS} --lengths=4k --peers --repeats=15",
    "both_ways": f"{BOTH_WAYS} --lengths=4k --peers --threads=1 --repeats=15",
    "forward": "--mode=fwd --attention=softmax,window,linear --lengths=4k --peers --threads=1",
    "peers_16k": "--attention=softmax,window,linear --lengths=16k --peers",
    "growth": f"--attention={CONSTANT},lsh,fenwick,recurrent_memory --lengths=4k,16k,64k",
    "floor": "--attention=softmax --lengths=16k --threads=1 --repeats=5",
    "floor_forward": "--mode=fwd --attention=softmax --lengths=16k --threads=1 --repeats=5",
    "softmax_64k": "--attention=softmax --lengths=64k --repeats=3",
    "decode": f"--mode=decode --attention=softmax,{CONSTANT} --lengths=1k,4k,16k,64k",
    "decode_lsh": "--mode=decode --attention=lsh --lengths=1k,4k,16k,64k",
    "train": "--mode=train --attention=softmax --lengths=1k --peers --config.task.batch=8 "
    "--config.model.layers=6 --config.model.width=256",
}

if __name__ == "__main__":
    for name in sys.argv[1:] or COMMANDS:
        words = [*COMMANDS[name].split(), f"--out=runs/benchmarks/{name}"]
        print("attnlab bench", *words, flush=True)
        subprocess.run([sys.executable, "-m", "attnlab", "bench", *words], check=False)
