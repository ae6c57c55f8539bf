"""sbatch, srun, sacct and scontrol requeue for one machine: an array's jobs run one after the other."""

import os
import sys
from pathlib import Path

SBATCH = r"""#!/bin/bash
script="${@: -1}"
export SLURM_JOB_ID=$((1000 + $(ls "$FAKE_SLURM" | wc -l))) SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0
export SLURM_NODEID=0 SLURM_JOB_NUM_NODES=1 SLURM_NNODES=1 SLURM_JOB_NODELIST=node1
export SLURM_CPUS_PER_TASK=$(sed -n 's/^#SBATCH --cpus-per-task=//p' "$script")
range=$(sed -n 's/^#SBATCH --array=\([0-9-]*\).*/\1/p' "$script")
copy=$FAKE_SLURM/$SLURM_JOB_ID
cp "$script" "$copy"
(if [ -z "$range" ]; then bash "$copy"; else
  for task in $(seq "${range%-*}" "${range#*-}"); do
    SLURM_ARRAY_JOB_ID=$SLURM_JOB_ID SLURM_ARRAY_TASK_ID=$task bash "$copy"
  done
fi) </dev/null >"$copy.out" 2>&1 &
echo "Submitted batch job $SLURM_JOB_ID"
"""
SRUN = r"""#!/bin/bash
while [[ "$1" == -* ]]; do
  [[ "$1" == --output || "$1" == --error ]] && shift
  shift
done
exec "$@"
"""
SCONTROL = r"""#!/bin/bash
[[ "$1" == requeue ]] || exit 0
echo "$2" >>"$FAKE_SLURM/requeued"
(sleep 1; bash "$FAKE_SLURM/$SLURM_JOB_ID") </dev/null >>"$FAKE_SLURM/$SLURM_JOB_ID.out" 2>&1 &
"""
SACCT = r"""#!/bin/bash
echo "JobID|State|NodeList"
while (($#)); do [[ "$1" == -j ]] && for i in 0 1 2 3; do echo "$2_$i|RUNNING|node1"; done; shift; done
"""


def install(folder: Path) -> dict[str, str]:
    """Writes the programs to `folder`; the environment in which they are found."""
    (folder / "bin").mkdir(parents=True)
    (folder / "jobs").mkdir()
    programs = {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT, "scontrol": SCONTROL}
    for name, text in programs.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"PATH": path, "FAKE_SLURM": str(folder / "jobs")}
