//! Splits PTX text into tokens that know their line.

use crate::ParseError;

/// What a token is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Tok {
    /// An identifier, register, keyword or instruction name, without dots.
    Word(String),
    /// A name that follows a dot: directive, modifier or axis. May hold `::`.
    Dot(String),
    Int(i128),
    /// `0f` followed by eight digits: the bits.
    F32(u32),
    /// `0d` followed by sixteen digits: the bits.
    F64(u64),
    /// A decimal literal.
    Dec(f64),
    Str(String),
    Punct(char),
}

/// A token and the line it starts on.
#[derive(Clone, Debug)]
pub(crate) struct Token {
    pub(crate) tok: Tok,
    pub(crate) line: u32,
}

struct Lexer<'a> {
    bytes: &'a [u8],
    at: usize,
    line: u32,
    out: Vec<Token>,
}

/// Reads all tokens of `text`.
pub(crate) fn lex(text: &str) -> Result<Vec<Token>, ParseError> {
    let mut lexer = Lexer { bytes: text.as_bytes(), at: 0, line: 1, out: Vec::new() };
    while lexer.skip_space()? {
        lexer.token()?;
    }
    Ok(lexer.out)
}

fn word_byte(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b == b'_' || b == b'$'
}

impl Lexer<'_> {
    fn error(&self, what: impl Into<String>) -> ParseError {
        ParseError { line: self.line, message: what.into() }
    }

    fn peek(&self, ahead: usize) -> u8 {
        self.bytes.get(self.at + ahead).copied().unwrap_or(0)
    }

    /// Skips blanks and comments; false at the end of the text.
    fn skip_space(&mut self) -> Result<bool, ParseError> {
        while self.at < self.bytes.len() {
            match (self.peek(0), self.peek(1)) {
                (b'\n', _) => {
                    self.line += 1;
                    self.at += 1;
                }
                (b, _) if b.is_ascii_whitespace() => self.at += 1,
                (b'/', b'/') => {
                    while self.at < self.bytes.len() && self.peek(0) != b'\n' {
                        self.at += 1;
                    }
                }
                (b'/', b'*') => {
                    while (self.peek(0), self.peek(1)) != (b'*', b'/') {
                        if self.at >= self.bytes.len() {
                            return Err(self.error("a comment does not end"));
                        }
                        self.line += u32::from(self.peek(0) == b'\n');
                        self.at += 1;
                    }
                    self.at += 2;
                }
                _ => return Ok(true),
            }
        }
        Ok(false)
    }

    fn take_word(&mut self) -> String {
        let start = self.at;
        while word_byte(self.peek(0)) {
            self.at += 1;
        }
        String::from_utf8_lossy(&self.bytes[start..self.at]).into_owned()
    }

    fn push(&mut self, tok: Tok) {
        self.out.push(Token { tok, line: self.line });
    }

    fn token(&mut self) -> Result<(), ParseError> {
        let b = self.peek(0);
        if b == b'.' && (word_byte(self.peek(1))) {
            self.at += 1;
            let mut name = self.take_word();
            while (self.peek(0), self.peek(1)) == (b':', b':') {
                self.at += 2;
                name.push_str("::");
                name.push_str(&self.take_word());
            }
            self.push(Tok::Dot(name));
        } else if b.is_ascii_alphabetic() || b == b'_' || b == b'$' || b == b'%' {
            if b == b'%' && !word_byte(self.peek(1)) {
                self.at += 1;
                self.push(Tok::Punct('%'));
                return Ok(());
            }
            self.at += usize::from(b == b'%');
            let name = self.take_word();
            self.push(Tok::Word(if b == b'%' { format!("%{name}") } else { name }));
        } else if b.is_ascii_digit() {
            let tok = self.number()?;
            self.push(tok);
        } else if b == b'"' {
            let start = self.at + 1;
            self.at = start;
            while self.peek(0) != b'"' {
                if self.at >= self.bytes.len() {
                    return Err(self.error("a string does not end"));
                }
                self.at += 1;
            }
            let text = String::from_utf8_lossy(&self.bytes[start..self.at]).into_owned();
            self.at += 1;
            self.push(Tok::Str(text));
        } else if b"{}()[]<>,;:@!|+-*/&^~=?".contains(&b) {
            self.at += 1;
            self.push(Tok::Punct(b as char));
        } else {
            return Err(self.error(format!("unexpected character {:?}", b as char)));
        }
        Ok(())
    }

    fn number(&mut self) -> Result<Tok, ParseError> {
        let start = self.at;
        let (b0, b1) = (self.peek(0), self.peek(1) | 0x20);
        if b0 == b'0' && matches!(b1, b'f' | b'd' | b'x' | b'b') {
            self.at += 2;
            let digits = self.take_word();
            let digits = digits.trim_end_matches(['U', 'u']);
            let radix = if b1 == b'b' { 2 } else { 16 };
            let wanted = match b1 {
                b'f' => 8,
                b'd' => 16,
                _ => digits.len(),
            };
            let value = u64::from_str_radix(digits, radix)
                .ok()
                .filter(|_| digits.len() == wanted)
                .ok_or_else(|| self.error(format!("bad number 0{}{digits}", b1 as char)))?;
            return Ok(match b1 {
                b'f' => Tok::F32(value as u32),
                b'd' => Tok::F64(value),
                _ => Tok::Int(value.into()),
            });
        }
        while self.peek(0).is_ascii_digit() {
            self.at += 1;
        }
        let decimal = (self.peek(0) == b'.' && self.peek(1).is_ascii_digit())
            || (self.peek(0) | 0x20) == b'e';
        if decimal {
            while matches!(self.peek(0), b'0'..=b'9' | b'.' | b'e' | b'E')
                || (matches!(self.peek(0), b'+' | b'-') && self.bytes[self.at - 1] | 0x20 == b'e')
            {
                self.at += 1;
            }
        }
        let text = String::from_utf8_lossy(&self.bytes[start..self.at]).into_owned();
        if decimal {
            let value = text.parse().map_err(|_| self.error(format!("bad number {text}")))?;
            return Ok(Tok::Dec(value));
        }
        if matches!(self.peek(0), b'U' | b'u') {
            self.at += 1;
        }
        // A leading zero means octal, as in C.
        let octal = text.len() > 1 && text.starts_with('0');
        i128::from_str_radix(&text, if octal { 8 } else { 10 })
            .map(Tok::Int)
            .map_err(|_| self.error(format!("bad number {text}")))
    }
}
