//! Texts of pickle protocol 0, which are written as lines of Python source.

/// The text of a protocol 0 string: quoted, with the escapes that Python's `repr` writes.
pub(super) fn unquote(s: &str) -> Result<Box<str>, String> {
    let s = s.trim_end_matches('\r');
    let inner = ['\'', '"'].iter().find_map(|&q| s.strip_prefix(q)?.strip_suffix(q)).ok_or("a string is not quoted")?;
    let mut out = String::with_capacity(inner.len());
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('n') => out.push('\n'),
            Some('t') => out.push('\t'),
            Some('r') => out.push('\r'),
            Some('x') => {
                let hex: String = chars.by_ref().take(2).collect();
                let byte = u8::from_str_radix(&hex, 16).ok().filter(|_| hex.len() == 2);
                out.push(char::from(byte.ok_or("a string has a broken escape")?));
            }
            Some(c @ ('\\' | '\'' | '"')) => out.push(c),
            _ => return Err("a string has an unknown escape".into()),
        }
    }
    Ok(out.into())
}

/// The text of a protocol 0 Unicode string: Latin-1 with `\uhhhh` and `\Uhhhhhhhh` for the rest.
pub(super) fn raw_unicode_escape(mut s: &[u8]) -> Result<Box<str>, String> {
    let mut out = String::with_capacity(s.len());
    while let [first, rest @ ..] = s {
        let digits = match rest.first() {
            Some(b'u') if *first == b'\\' => 4,
            Some(b'U') if *first == b'\\' => 8,
            _ => {
                out.push(char::from(*first));
                s = rest;
                continue;
            }
        };
        let hex = rest.get(1..=digits).and_then(|h| std::str::from_utf8(h).ok());
        let c = hex.and_then(|h| u32::from_str_radix(h, 16).ok()).and_then(char::from_u32);
        out.push(c.ok_or("a string has a broken escape")?);
        s = &rest[1 + digits..];
    }
    Ok(out.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes() {
        assert_eq!(&*unquote(r#"'a\n\x41\'\\'"#).unwrap(), "a\nA'\\");
        assert!(unquote("'").is_err() && unquote("a").is_err() && unquote(r"'\x4'").is_err());
        assert_eq!(&*raw_unicode_escape(b"\xe9\\u20ac\\U0001f600\\n").unwrap(), "\u{e9}\u{20ac}\u{1f600}\\n");
        assert!(raw_unicode_escape(b"\\ud800").is_err() && raw_unicode_escape(b"\\u12").is_err());
    }
}
