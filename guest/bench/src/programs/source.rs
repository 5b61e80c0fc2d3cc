//! The C program that is compiled: functions of the kinds that compilers work on, and a checksum of what they do.

use std::fmt::Write;

/// So many functions of each kind.
const FUNCTIONS: u32 = 60;

/// What the program prints.
pub const PRINTS: &str = "1598520256\n";

/// Its source.
pub fn generate() -> String {
    let mut text = String::from(HEAD);
    for n in 0..FUNCTIONS {
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "static unsigned loop{n}(unsigned *a, unsigned x) {{\n\
             \tunsigned s = {n};\n\
             \tfor (unsigned i = 0; i < COUNT; i++) {{\n\
             \t\ta[i] = a[i] * {}u + x;\n\
             \t\tif ((a[i] & {}) == 0) s ^= a[(i + {}) % COUNT]; else s += a[i] >> {};\n\
             \t}}\n\
             \treturn s;\n}}\n",
            2 * n + 3,
            (1 << (n % 5)) - 1,
            n + 1,
            n % 13 + 1,
        );
        let _ = write!(text, "static unsigned select{n}(unsigned x) {{\n\tswitch (x % 16) {{\n");
        for case in 0..16 {
            let _ = writeln!(text, "\tcase {case}: return x * {} + {};", case * n + 1, case ^ n);
        }
        let _ = write!(text, "\t}}\n\treturn 0;\n}}\n");
        let _ = write!(
            text,
            "static struct node *list{n}(struct node *free, unsigned x) {{\n\
             \tstruct node *head = 0;\n\
             \tfor (int i = 0; i < {}; i++) {{\n\
             \t\tstruct node *new = &free[i], **at = &head;\n\
             \t\tnew->key = (x = x * 1103515245u + {n});\n\
             \t\twhile (*at && (*at)->key < new->key) at = &(*at)->next;\n\
             \t\tnew->next = *at;\n\
             \t\t*at = new;\n\
             \t}}\n\
             \treturn head;\n}}\n",
            n % 24 + 8,
        );
    }
    text.push_str("int main(void) {\n\tunsigned s = 1;\n\tfor (int i = 0; i < COUNT; i++) a[i] = i;\n");
    for n in 0..FUNCTIONS {
        let _ = writeln!(text, "\ts = s * 31 + loop{n}(a, s);\n\ts = s * 31 + select{n}(s);");
        let _ =
            writeln!(text, "\tfor (struct node *n = list{n}(nodes, s); n; n = n->next) s = s * 31 + n->key;");
    }
    text.push_str("\tprintf(\"%u\\n\", s);\n\treturn 0;\n}\n");
    text
}

const HEAD: &str = "#include <stdio.h>\n\
                    #define COUNT 64\n\
                    struct node { unsigned key; struct node *next; };\n\
                    static unsigned a[COUNT];\n\
                    static struct node nodes[32];\n";
