import sys
sys.meta_path[:]=[f for f in sys.meta_path if type(f).__name__!="ScikitBuildRedirectingFinder"]
sys.path.insert(0,"/tmp/sgm/src")
import subbyte; assert subbyte.__file__.startswith("/tmp/sgm"), subbyte.__file__
import runpy
sys.argv=sys.argv[1:]
if sys.argv[0]=="-m":
    m=sys.argv[1]; sys.argv=sys.argv[1:]; runpy.run_module(m, run_name="__main__", alter_sys=True)
else: runpy.run_path(sys.argv[0], run_name="__main__")
