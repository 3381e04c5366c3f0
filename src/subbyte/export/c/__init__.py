"""C source: one .c and one .h, C99, without dependencies and without malloc (docs/export.md)."""

from subbyte.export.c.write import EXPORTER as EXPORTER
