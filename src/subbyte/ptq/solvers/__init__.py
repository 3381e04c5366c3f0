"""How a layer gets its codes and its adapter."""
