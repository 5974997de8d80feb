//! The little of Redis' protocol (RESP 2) that the client speaks.

use std::io::{BufRead, Error, Read, Result};

/// Our own values have 100 bytes; an answer longer than this is no answer to us.
const BULK_BYTES_MAX: usize = 1 << 20;
/// Simple answers and lengths are short.
const LINE_BYTES_MAX: u64 = 4096;

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reply {
    Simple(Vec<u8>),
    Error(String),
    Integer(i64),
    Bulk(Option<Vec<u8>>),
}

/// Appends a command.
pub(super) fn command(to: &mut Vec<u8>, words: &[&[u8]]) {
    to.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        to.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        to.extend_from_slice(word);
        to.extend_from_slice(b"\r\n");
    }
}

/// Reads an answer.
pub(super) fn reply(from: &mut impl BufRead) -> Result<Reply> {
    let line = line(from)?;
    let (kind, rest) = line.split_first().ok_or_else(|| Error::other("an empty line from Redis"))?;
    let text = String::from_utf8_lossy(rest);
    let number = || text.parse::<i64>().map_err(|_| Error::other(format!("no number from Redis: {text}")));
    match kind {
        b'+' => Ok(Reply::Simple(rest.to_vec())),
        b'-' => Ok(Reply::Error(text.into_owned())),
        b':' => Ok(Reply::Integer(number()?)),
        b'$' => bulk(from, number()?),
        _ => Err(Error::other(format!("no answer of Redis: {}", String::from_utf8_lossy(&line)))),
    }
}

fn bulk(from: &mut impl BufRead, length: i64) -> Result<Reply> {
    if length == -1 {
        return Ok(Reply::Bulk(None));
    }
    let length = usize::try_from(length).ok().filter(|l| *l <= BULK_BYTES_MAX);
    let length = length.ok_or_else(|| Error::other("an answer of Redis is too long"))?;
    let mut bytes = vec![0; length + 2];
    from.read_exact(&mut bytes)?;
    bytes.truncate(length);
    Ok(Reply::Bulk(Some(bytes)))
}

fn line(from: &mut impl BufRead) -> Result<Vec<u8>> {
    let mut line = Vec::new();
    from.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
    match line.strip_suffix(b"\r\n") {
        Some(content) => Ok(content.to_vec()),
        None if line.is_empty() => Err(Error::other("Redis closed the connection")),
        None => Err(Error::other("a line of Redis does not end")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read() {
        let mut input = &b"+OK\r\n:7\r\n$-1\r\n$3\r\na\r\n\r\n-ERR no\r\n"[..];
        let mut next = || reply(&mut input).unwrap();
        assert_eq!(next(), Reply::Simple(b"OK".to_vec()));
        assert_eq!(next(), Reply::Integer(7));
        assert_eq!(next(), Reply::Bulk(None));
        assert_eq!(next(), Reply::Bulk(Some(b"a\r\n".to_vec())));
        assert_eq!(next(), Reply::Error("ERR no".into()));
    }

    #[test]
    fn garbage_is_an_error() {
        for garbage in
            [&b""[..], b"\r\n", b"?x\r\n", b"$9999999999\r\n", b"$-7\r\n", b"$5\r\nab", b"+no end", b":x\r\n"]
        {
            reply(&mut &*garbage).unwrap_err();
        }
    }
}
