"""How fast packed layers are on this machine, against float layers and against the machine."""
