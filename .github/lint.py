"""What yamllint cannot see in the workflows: that the gate waits for every job, and that what they run is there."""
import pathlib
import re
import sys

import yaml

root = pathlib.Path(__file__).resolve().parent.parent
wrong = []
for path in sorted((root / ".github" / "workflows").glob("*.yml")):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    jobs = workflow["jobs"]
    others = set(jobs) - {"gate"}
    if "gate" in jobs:
        missed = others.symmetric_difference(jobs["gate"]["needs"])
        if missed:
            wrong.append(f"{path.name}: the gate's needs and the jobs differ in {', '.join(sorted(missed))}")
    elif path.name == "ci.yml":
        wrong.append("ci.yml has no job called gate")
    if "permissions" not in workflow:
        wrong.append(f"{path.name} does not state its permissions")
    for name, job in jobs.items():
        for step in job["steps"]:
            if "uses" in step and not re.search(r"@(v\d+|[0-9a-f]{40})$", step["uses"]):
                wrong.append(f"{path.name}: job {name} uses {step['uses']}, which is pinned neither by version nor by hash")
            for script in re.findall(r"\bsh ([\w./-]+)|-S ([\w./-]+)", step.get("run", "")):
                if not (root / "".join(script)).exists():
                    wrong.append(f"{path.name}: job {name} runs {''.join(script)}, which does not exist")
print("\n".join(wrong) or "the workflows name every job and every script")
sys.exit(1 if wrong else 0)
