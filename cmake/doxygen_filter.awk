# The headers' plain comments as Doxygen's. What it makes of them:
#   - the comment above a declaration, and of the declarations that follow it without a blank line or their own comment;
#   - the comment behind a declaration on its line, and its further lines at the same column;
#   - a comment of several names declared at once is each one's;
#   - indented lines of a comment, code and formulae, stay as they are.
# Section lines (// ---- ...) and what is said inside functions are no such comments, and the inline namespace FASTV_KIND,
# which users do not name, is left out.
function escaped(s) {
  gsub(/[<>#@%&\\$]/, "\\\\&", s)
  return s
}
function indent(s) {
  match(s, /^ */)
  return RLENGTH
}
# Braces that a line of code leaves open, or closes beyond its own.
function opened(s) {
  sub(/  *\/\/.*/, "", s)
  return gsub(/\{/, "", s) - gsub(/\}/, "", s)
}
# Prints a line of a comment that was held back, and holds the next.
function hold(line, next_line) {
  if (line != "") {
    above[indent(line)] = above[indent(line)] line "\n"
    print line
  }
  held = next_line
}
# Prints a declaration, one for each of its names.
function declare(code, doc,    type, names, count, i, first) {
  if (match(code, /^ +[A-Za-z_:<>* ]*[ *][a-z_]+( = [A-Za-z0-9_:.]+)?(, [a-z_]+( = [A-Za-z0-9_:.]+)?)+;$/)) {
    count = split(substr(code, 1, length(code) - 1), names, /, /)
    match(names[1], /[a-z_]+( = [A-Za-z0-9_:.]+)?$/)
    type = substr(names[1], 1, RSTART - 1)
    names[1] = substr(names[1], RSTART)
    for (i = 1; i <= count; ++i) {
      if (doc == "" && i > 1 && (indent(code) in above)) printf "%s", above[indent(code)]
      print type names[i] ";" doc
    }
    return
  }
  print code doc
}
/^(inline namespace FASTV_KIND \{|\}  \/\/ namespace FASTV_KIND)$/ { $0 = "" }
body {  # of a function: up to its closing brace
  body += opened($0)
  if (!body) {
    last = "code"
    last_ended = 1
  }
  print
  next
}
{
  kind = "code"
  if ($0 ~ /^ *$/) kind = "blank"
  else if ($0 ~ /^ *\/\/ ----/) kind = "section"
  else if ($0 ~ /^ *\/\/( |$)/) kind = index($0, "//") == behind ? "behind" : "above"

  # The last indented line is known by the one behind it.
  if (held != "" && !(kind == "above" && substr($0, indent($0) + 3) ~ /^   /)) hold(held " \\endverbatim", "")
  if (kind == "blank" || kind == "section") {
    parted = 1
    behind = 0
    last_ended = 0
    print ""
  } else if (kind == "behind") {
    print substr($0, 1, behind - 1) "///< " escaped(substr($0, behind + 3))
    next
  } else {
    column = indent($0)
    # A comment reaches as far as the next blank line that is no deeper than itself.
    if (parted || (kind == "above" && last != "above"))
      for (deep in above)
        if (deep + 0 >= column) delete above[deep]
    parted = 0
    if (kind == "above") {
      behind = 0
      text = substr($0, column + 4)
      if (text ~ /^  /) {
        hold(held, substr($0, 1, column) "/// " (held == "" ? "\\verbatim" : "") text)
      } else {
        line = substr($0, 1, column) "/// " escaped(text)
        if (NR == 1) line = "/// \\file\n" line
        above[column] = above[column] line "\n"
        print line
      }
      last_ended = 0
    } else {
      behind = 0
      if (match($0, /[^ ]  +\/\/ /)) behind = RSTART + RLENGTH - 3
      code = $0
      if (behind) code = substr($0, 1, RSTART)
      if (behind && substr(code, length(code)) == "{") {  # of a type, not of what is ahead
        print "/// " escaped(substr($0, behind + 3))
        declare(code, "")
      } else if (behind) {
        declare(code, "  ///< " escaped(substr($0, behind + 3)))
      } else {
        # A declaration begins where the one ahead of it has ended.
        if (last_ended && $0 !~ /^ *[})#:]/ || $0 ~ /^#define [A-Z]/ && last != "above") printf "%s", (column in above ? above[column] : "")
        declare(code, "")
      }
      last_ended = code ~ /[;}]$/ || code ~ /^#define/
      if (opened(code) > 0 && code !~ /^ *(inline )?(namespace|struct|class|enum|union|extern)/) body = opened(code)
    }
  }
  last = kind
}
