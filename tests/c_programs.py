"""Exported C source, compiled and run: what the tests of C source share."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

GCC, ARM_GCC, ARM = "gcc", "arm-linux-gnueabihf-gcc", "qemu-arm"
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")
SANITIZED = (*STRICT, "-O1", "-fsanitize=undefined,address", "-fno-sanitize-recover=all")

PROBE = """
#include <stdio.h>
static void probe(const char *name, const void *values, unsigned long count, unsigned long size)
{
    static FILE *file;
    if (!file) file = fopen("probes.bin", "wb");
    fprintf(file, "%s %lu\\n", name, count);
    fwrite(values, size, count, file);
    fflush(file);
}
"""
MAIN = """
#include <stdio.h>
#include "{name}.h"
{arrays}
int main(void)
{{
    while ({reads}) {{
        {name}({args});
        {writes}
    }}
    return 0;
}}
"""


def missing(*programs):
    """Why programs cannot run here, or None."""
    absent = [p for p in programs if shutil.which(p) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


@dataclass
class Program:
    """A compiled network. run: float or integer arrays of one example in, a list of arrays out."""

    folder: Path
    name: str
    command: list
    outputs: list  # (C type, size)

    def run(self, *inputs):
        data = b"".join(np.ascontiguousarray(x).tobytes() for x in inputs)
        done = subprocess.run(self.command, input=data, capture_output=True, cwd=self.folder)
        assert done.returncode == 0, done.stderr.decode()[:3000]
        found, at = [], 0
        for ctype, size in self.outputs:
            dtype = {"float": np.float32, "int32_t": np.int32, "int64_t": np.int64}[ctype]
            found.append(np.frombuffer(done.stdout, dtype, size, at).copy())
            at += found[-1].nbytes
        assert at == len(done.stdout)
        return found

    def probes(self):
        """Name of a value -> what the last run made of it."""
        data, found, at = (self.folder / "probes.bin").read_bytes(), {}, 0
        dtype = np.dtype({"float": np.float32, "int32_t": np.int32}[self.outputs[0][0]])
        while at < len(data):
            end = data.index(b"\n", at)
            name, count = data[at:end].decode().split()
            found[name] = np.frombuffer(data, dtype, int(count), end + 1).copy()
            at = end + 1 + int(count) * dtype.itemsize
        return found


def compiled(path, flags=SANITIZED, gcc=GCC, run=(), probes=False):
    """Compile an exported .c with a main around it."""
    path, name = Path(path), Path(path).stem
    folder, text = path.parent, path.with_suffix(".h").read_text()
    prototype = re.search(rf"void {name}\(([^)]*)\)", text).group(1)
    sizes = dict(re.findall(rf"#define {name.upper()}_(\w+)_SIZE (\d+)", text))
    names = [(part.rsplit("*", 1)[1], part.replace("const", "").split()[0], "const" in part)
             for part in prototype.split(", ")]  # fmt: skip
    arrays = [f"static {ctype} {n}[{sizes[n.upper()]}];" for n, ctype, _ in names]
    reads = [f"fread({n}, sizeof {n}, 1, stdin) == 1" for n, _, given in names if given]
    writes = [f"fwrite({n}, sizeof {n}, 1, stdout);" for n, _, given in names if not given]
    (folder / "main.c").write_text(MAIN.format(
        name=name, arrays="\n".join(arrays), reads=" && ".join(reads),
        args=", ".join(n for n, _, _ in names), writes=" ".join(writes),
    ))  # fmt: skip
    (folder / "probe.h").write_text(PROBE)
    macro = f"{name.upper()}_PROBE(n,v,c)=probe(n,v,c,sizeof *(v))"
    follow = ["-include", "probe.h", f"-D{macro}"] if probes else []
    objects = []
    for source in (f"{name}.c", "main.c"):
        extra = follow if source != "main.c" else []
        objects.append(source.replace(".c", ".o"))
        call([gcc, *flags, *extra, "-c", source, "-o", objects[-1]], folder)
    call([gcc, *flags, *objects, "-o", "program", "-lm"], folder)
    outputs = [(ctype, int(sizes[n.upper()])) for n, ctype, given in names if not given]
    return Program(folder, name, [*run, "./program"], outputs)


def call(command, folder):
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:3000]}"
