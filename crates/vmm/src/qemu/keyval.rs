//! The values of QEMU's options: `driver=virtio-net-pci,id=n0,mac=..` with `,,` for a comma, or the same as JSON.
//!
//! What is checked here is written out again from what was read, never passed through as it came: QEMU then cannot
//! read it otherwise than we did.

use serde_json::{Map, Value};

/// How deep JSON may be nested: block graphs have four levels.
const DEPTH_MAX: usize = 16;

/// One `key=value`, `key` alone (a flag), or the first value whose key is implied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pair {
    pub(super) key: String,
    pub(super) value: Option<String>,
    implied: bool,
}

/// The value of an option, read.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Settings {
    /// `a,b=c`
    List(Vec<Pair>),
    /// `{"a": "b"}`
    Json(Map<String, Value>),
}

impl Settings {
    /// Reads a value. `implied` is the key of a first value that has none.
    pub(super) fn parse(text: &str, implied: &str) -> Option<Self> {
        if text.starts_with('{') {
            return match serde_json::from_str(text).ok()? {
                Value::Object(map) if depth(&map) <= DEPTH_MAX => Some(Settings::Json(map)),
                _ => None,
            };
        }
        let segments = split(text);
        let pairs = segments.into_iter().enumerate().map(|(at, segment)| match segment.split_once('=') {
            Some((key, value)) => Pair { key: key.to_owned(), value: Some(value.to_owned()), implied: false },
            None if at == 0 && !implied.is_empty() => {
                Pair { key: implied.to_owned(), value: Some(segment), implied: true }
            }
            None => Pair { key: segment, value: None, implied: false },
        });
        Some(Settings::List(pairs.collect()))
    }

    /// The last value of a key: QEMU's rule when one is given twice.
    pub(super) fn value(&self, key: &str) -> Option<String> {
        match self {
            Settings::List(pairs) => pairs.iter().rev().find(|pair| pair.key == key)?.value.clone(),
            Settings::Json(map) => match map.get(key)? {
                Value::String(text) => Some(text.clone()),
                other => Some(other.to_string()),
            },
        }
    }

    /// Takes a key out; its value, if it had one.
    pub(super) fn remove(&mut self, key: &str) -> Option<String> {
        let value = self.value(key);
        match self {
            Settings::Json(map) => drop(map.remove(key)),
            Settings::List(pairs) => pairs.retain(|pair| pair.key != key),
        }
        value
    }

    /// Sets a key for good: every earlier value of it goes.
    pub(super) fn set(&mut self, key: &str, value: &str) {
        match self {
            Settings::Json(map) => drop(map.insert(key.to_owned(), Value::String(value.to_owned()))),
            Settings::List(pairs) => {
                let place = pairs.iter().position(|pair| pair.key == key);
                let implied = place.and_then(|at| pairs.get(at)).is_some_and(|pair| pair.implied);
                pairs.retain(|pair| pair.key != key);
                let place = place.unwrap_or(pairs.len()).min(pairs.len());
                pairs.insert(place, Pair { key: key.to_owned(), value: Some(value.to_owned()), implied });
            }
        }
    }

    /// Gives each key and value to `change`, which returns what to put in the value's place. Nested keys of JSON
    /// are dotted, as QEMU's other form has them.
    pub(super) fn rewrite<E>(
        &mut self,
        change: &mut impl FnMut(&str, &str) -> Result<String, E>,
    ) -> Result<(), E> {
        match self {
            Settings::Json(map) => {
                map.iter_mut().try_for_each(|(key, value)| rewrite_json(key, value, change))
            }
            Settings::List(pairs) => pairs.iter_mut().try_for_each(|pair| {
                // A flag is the same as `key=on`.
                let changed = change(&pair.key, pair.value.as_deref().unwrap_or("on"))?;
                if pair.value.is_some() {
                    pair.value = Some(changed);
                }
                Ok(())
            }),
        }
    }

    /// Every key with its value, in order; keys that are nested are dotted.
    pub(super) fn pairs(&self) -> Vec<(String, String)> {
        let mut found = Vec::new();
        let seen: Result<(), std::convert::Infallible> = self.clone().rewrite(&mut |key, value| {
            found.push((key.to_owned(), value.to_owned()));
            Ok(value.to_owned())
        });
        let Ok(()) = seen;
        found
    }

    /// Writes it out for QEMU.
    pub(super) fn to_text(&self) -> String {
        match self {
            Settings::Json(map) => Value::Object(map.clone()).to_string(),
            Settings::List(pairs) => pairs.iter().map(Pair::to_text).collect::<Vec<_>>().join(","),
        }
    }
}

impl Pair {
    fn to_text(&self) -> String {
        let escape = |text: &str| text.replace(',', ",,");
        match &self.value {
            // An equals sign would make the beginning of the value a key.
            Some(value) if self.implied && !value.contains('=') => escape(value),
            Some(value) => format!("{}={}", escape(&self.key), escape(value)),
            None => escape(&self.key),
        }
    }
}

/// Splits at single commas; two commas are one that belongs to the text.
fn split(text: &str) -> Vec<String> {
    let mut segments = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let ends = c == ',' && chars.next_if_eq(&',').is_none();
        match segments.last_mut() {
            Some(segment) if !ends => segment.push(c),
            _ => segments.push(String::new()),
        }
    }
    // A comma at the end says nothing.
    segments.pop_if(|last| last.is_empty());
    segments
}

fn rewrite_json<E>(
    key: &str,
    value: &mut Value,
    change: &mut impl FnMut(&str, &str) -> Result<String, E>,
) -> Result<(), E> {
    match value {
        Value::Object(map) => map
            .iter_mut()
            .try_for_each(|(inner, value)| rewrite_json(&format!("{key}.{inner}"), value, change)),
        Value::Array(list) => {
            let mut items = list.iter_mut().enumerate();
            items.try_for_each(|(at, value)| rewrite_json(&format!("{key}.{at}"), value, change))
        }
        Value::String(text) => {
            *text = change(key, text)?;
            Ok(())
        }
        // Numbers and truth values name no file: asked about, for the key may be forbidden, and left as they are.
        other => change(key, &other.to_string()).map(drop),
    }
}

fn depth(map: &Map<String, Value>) -> usize {
    fn of(value: &Value) -> usize {
        match value {
            Value::Object(map) => depth(map),
            Value::Array(list) => 1 + list.iter().map(of).max().unwrap_or(0),
            _ => 0,
        }
    }
    1 + map.values().map(of).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Settings {
        Settings::parse(text, "driver").unwrap()
    }

    #[test]
    fn commas_are_escaped_by_commas() {
        let settings = parse("file=/a,,b,id=x,,,y=1");
        assert_eq!(settings.value("file").unwrap(), "/a,b");
        assert_eq!(settings.value("id").unwrap(), "x,");
        assert_eq!(settings.value("y").unwrap(), "1");
        assert_eq!(settings.to_text(), "file=/a,,b,id=x,,,y=1");
    }

    #[test]
    fn a_first_value_has_an_implied_key_and_later_ones_are_flags() {
        let settings = parse("socket,server,wait=off");
        assert_eq!(settings.value("driver").unwrap(), "socket");
        assert_eq!(settings.value("server"), None);
        assert_eq!(settings.to_text(), "socket,server,wait=off");
    }

    #[test]
    fn setting_a_key_drops_every_earlier_value_of_it() {
        let mut settings = parse("q35,accel=tcg,driver=pc");
        settings.set("driver", "pc-q35-7.2");
        assert_eq!(settings.to_text(), "pc-q35-7.2,accel=tcg");
        settings.set("new", "a,b");
        assert_eq!(settings.to_text(), "pc-q35-7.2,accel=tcg,new=a,,b");
    }

    #[test]
    fn json_is_rewritten_at_any_depth() {
        let mut settings = parse(r#"{"driver":"qcow2","file":{"filename":"/a","n":1},"list":["/b"]}"#);
        let mut seen = Vec::new();
        let done: Result<(), ()> = settings.rewrite(&mut |key, value| {
            seen.push(key.to_owned());
            Ok(value.replace('/', "!"))
        });
        assert_eq!(done, Ok(()));
        assert_eq!(seen, ["driver", "file.filename", "file.n", "list.0"]);
        assert_eq!(settings.to_text(), r#"{"driver":"qcow2","file":{"filename":"!a","n":1},"list":["!b"]}"#);
    }

    #[test]
    fn json_that_is_no_object_or_too_deep_is_refused() {
        let deep = format!("{}1{}", r#"{"a":"#.repeat(40), "}".repeat(40));
        for text in ["{", r#"{"a":1}x"#, &deep] {
            assert_eq!(Settings::parse(text, ""), None, "{text}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_is_written_is_read_as_the_same(text in "[a-z=,{}\"/:]{0,40}") {
            if let Some(first) = Settings::parse(&text, "driver") {
                let again = Settings::parse(&first.to_text(), "driver").unwrap();
                prop_assert_eq!(again.to_text(), first.to_text());
            }
        }
    }
}
