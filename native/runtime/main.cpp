// The command subbyte-run; the library has what it does.
#include "subbyte.h"

int main(int count, char** words) { return subbyte_command(count, words); }
