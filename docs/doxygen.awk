# Lets Doxygen read plain comments: the first comment of a file describes the file, any other the declaration that follows it,
# or that it follows on its line. Indented lines of a comment are shown as they stand; what looks like a command is text.

function escaped(text) {
  gsub(/[\\@&#<>%*_`|$\[\]]/, "\\\\&", text)
  gsub(/::/, "\\::", text)
  gsub(/"/, "\\&quot;", text)   # between plain quotes Doxygen would take escapes for commands
  return text
}
function is_code(text) { return gsub(/"/, "", text) % 2 == 0 }   # not inside a string
# A line waits here until the next one shows whether the comment, and its indented part, go on.
function print_waiting(next_is_comment, next_is_indented) {
  if (waiting) print line (indented && !next_is_indented ? " \\endverbatim" : "") (next_is_comment ? "" : " */")
  waiting = next_is_comment
}

{ sub(/^namespace hybridattn::inline HYBRIDATTN_ABI/, "namespace hybridattn") }   # the flags in the names (core/config.hpp)
NR == 1 && /^\/\/ / {
  line = "/** \\file"
  waiting = 1
}
/^ *\/\/( |$)/ {
  text = substr($0, index($0, "//") + 2)
  goes_on = waiting
  is_indented = text ~ /^   /
  print_waiting(1, is_indented)
  line = is_indented ? (indented ? "" : " \\verbatim ") substr(text, 4) : escaped(text)
  if (!goes_on) line = "/**" line
  indented = is_indented
  next
}
{
  print_waiting(0, 0)
  indented = 0
}
match($0, /[^ {] +\/\/ /) && is_code(substr($0, 1, RSTART)) {
  print substr($0, 1, RSTART) "  /**< " escaped(substr($0, RSTART + RLENGTH)) " */"
  next
}
{ print }
END { print_waiting(0, 0) }
