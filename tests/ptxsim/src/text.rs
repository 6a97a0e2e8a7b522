//! PTX text cut into statements, operands and numbers.

/// A statement without its end, and the line where it starts.
pub(crate) struct Statement {
    pub(crate) line: u32,
    pub(crate) text: String,
}

/// Statements end at `;`, at a brace that opens or closes a scope, after a label, or (directives of the head) at the line's end.
pub(crate) fn statements(source: &str) -> Vec<Statement> {
    let mut out = Vec::new();
    let mut current = String::new();
    let (mut line, mut start) = (1, 1);
    let mut depth = 0;
    let mut chars = source.chars().peekable();
    let mut push = |line: u32, text: &str| {
        if !text.trim().is_empty() {
            out.push(Statement { line, text: text.trim().to_string() });
        }
    };
    while let Some(c) = chars.next() {
        if c == '/' && chars.peek() == Some(&'/') {
            while chars.peek().is_some_and(|c| *c != '\n') {
                chars.next();
            }
            continue;
        }
        if c == '/' && chars.peek() == Some(&'*') {
            let mut last = ' ';
            for c in chars.by_ref() {
                line += u32::from(c == '\n');
                if last == '*' && c == '/' {
                    break;
                }
                last = c;
            }
            continue;
        }
        let text = current.trim_start();
        if text.is_empty() {
            start = line;
        }
        line += u32::from(c == '\n');
        match c {
            '{' if text.is_empty() || text.contains(".entry") || text.contains(".func") => {
                push(start, text);
                push(line, "{");
                current.clear();
            }
            '{' => {
                depth += 1;
                current.push(c);
            }
            '}' if depth > 0 => {
                depth -= 1;
                current.push(c);
            }
            '}' => {
                push(start, text);
                push(line, "}");
                current.clear();
            }
            ';' => {
                push(start, text);
                current.clear();
            }
            ':' if is_name(text) && chars.peek() != Some(&':') => {
                push(start, &format!("{}:", text.trim()));
                current.clear();
            }
            '\n' if [".version", ".target", ".address_size", ".file"].iter().any(|d| text.starts_with(d)) => {
                push(start, text);
                current.clear();
            }
            c if c.is_whitespace() => current.push(' '),
            c => current.push(c),
        }
    }
    push(start, &current);
    out
}

fn is_name(s: &str) -> bool {
    !s.is_empty() && s.trim_end().chars().all(|c| c.is_alphanumeric() || c == '_' || c == '$')
}

/// Parts between the commas that stand outside of all brackets.
pub(crate) fn split(s: &str) -> Vec<&str> {
    let (mut out, mut depth, mut start) = (Vec::new(), 0, 0);
    for (i, c) in s.char_indices() {
        match c {
            '{' | '[' | '(' => depth += 1,
            '}' | ']' | ')' => depth -= 1,
            ',' if depth == 0 => {
                out.push(s[start..i].trim());
                start = i + 1;
            }
            _ => {}
        }
    }
    if !s[start..].trim().is_empty() {
        out.push(s[start..].trim());
    }
    out
}

/// Decimal, hexadecimal, octal or binary, with a sign and the suffix U.
pub(crate) fn number(s: &str) -> Option<i128> {
    let (negative, s) = match s.trim().strip_prefix('-') {
        Some(rest) => (true, rest.trim()),
        None => (false, s.trim()),
    };
    let s = s.strip_suffix('U').unwrap_or(s);
    let value = match s.get(..2) {
        Some("0x" | "0X") => i128::from_str_radix(&s[2..], 16).ok()?,
        Some("0b" | "0B") => i128::from_str_radix(&s[2..], 2).ok()?,
        _ if s.len() > 1 && s.starts_with('0') => i128::from_str_radix(s, 8).ok()?,
        _ => s.parse().ok()?,
    };
    Some(if negative { -value } else { value })
}

/// An integer, or the bits of a float (`0f3F800000`, `0d3FF0000000000000`).
pub(crate) fn literal(s: &str) -> Option<u64> {
    match s.get(..2) {
        Some("0f" | "0F") => u32::from_str_radix(&s[2..], 16).ok().map(u64::from),
        Some("0d" | "0D") => u64::from_str_radix(&s[2..], 16).ok(),
        _ => number(s).map(|n| n as u64),
    }
}
