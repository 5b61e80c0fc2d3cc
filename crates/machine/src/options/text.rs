//! The `KEY=VALUE,…` form of an option, read by the same serde types as a VM file.
//!
//! Keys are separated by commas; a comma in a value is written twice. A word without `=` is a key whose value is
//! `true`, except that the first one may stand for the value of a key that the option names. A key that takes a
//! list is given several times.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeOwned, DeserializeSeed, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use serde::forward_to_deserialize_any;

/// Why an option cannot be understood. One line for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct OptionError(pub String);

impl de::Error for OptionError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self(unknown("key", field, expected))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self(unknown("value", variant, expected))
    }

    fn missing_field(field: &'static str) -> Self {
        Self(format!("the key {field} is missing"))
    }
}

fn unknown(what: &str, name: &str, expected: &[&str]) -> String {
    let nearest = expected.iter().min_by_key(|known| strsim::damerau_levenshtein(name, known));
    let hint = nearest.filter(|known| strsim::normalized_damerau_levenshtein(name, known) >= 0.5);
    let hint = hint.map_or(String::new(), |known| format!(" (do you mean {known}?)"));
    format!("there is no {what} {name:?}{hint}: possible are {}", expected.join(", "))
}

/// Reads an option. If the first word has no `=` it is the value of the key `first`, where one is given.
///
/// # Errors
/// [`OptionError`] that names the key.
pub fn parse<T: DeserializeOwned>(text: &str, first: Option<&str>) -> Result<T, OptionError> {
    let mut keys: Vec<(String, Vec<String>)> = Vec::new();
    for (i, word) in words(text).into_iter().enumerate() {
        let (key, value) = match (word.split_once('='), first) {
            (Some((key, value)), _) => (key.to_owned(), value.to_owned()),
            (None, Some(key)) if i == 0 => (key.to_owned(), word),
            (None, _) => (word, "true".to_owned()),
        };
        if key.is_empty() {
            return Err(OptionError("there is an empty key: write KEY=VALUE,KEY=VALUE".to_owned()));
        }
        match keys.iter_mut().find(|(k, _)| *k == key) {
            Some((_, values)) => values.push(value),
            None => keys.push((key, vec![value])),
        }
    }
    T::deserialize(Keys { rest: keys.iter(), value: None })
}

/// Splits at single commas.
fn words(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(c) = characters.next() {
        if c == ',' && characters.next_if_eq(&',').is_none() {
            words.push(String::new());
        } else if let Some(word) = words.last_mut() {
            word.push(c);
        }
    }
    if words.len() == 1 && words.iter().all(String::is_empty) { Vec::new() } else { words }
}

/// The keys of an option as a map.
struct Keys<'a> {
    rest: std::slice::Iter<'a, (String, Vec<String>)>,
    value: Option<&'a (String, Vec<String>)>,
}

impl<'de> de::Deserializer<'de> for Keys<'_> {
    type Error = OptionError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_map(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

impl<'de> MapAccess<'de> for Keys<'_> {
    type Error = OptionError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, OptionError> {
        self.value = self.rest.next();
        self.value.map(|(key, _)| seed.deserialize(key.as_str().into_deserializer())).transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, OptionError> {
        let Some((key, values)) = self.value.take() else {
            return Err(OptionError("internal error: a value without a key".to_owned()));
        };
        seed.deserialize(Value(values)).map_err(|OptionError(e)| OptionError(format!("{key}: {e}")))
    }
}

/// All values of one key.
struct Value<'a>(&'a [String]);

impl Value<'_> {
    fn one(&self) -> Result<&str, OptionError> {
        match self.0 {
            [value] => Ok(value),
            _ => Err(OptionError("it is given more than once".to_owned())),
        }
    }

    fn number<T: std::str::FromStr<Err: fmt::Display>>(&self) -> Result<T, OptionError> {
        let text = self.one()?;
        text.parse().map_err(|e| OptionError(format!("{text:?} is not possible: {e}")))
    }
}

macro_rules! numbers {
    ($($method:ident $visit:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
            visitor.$visit(self.number()?)
        }
    )*};
}

impl<'de> de::Deserializer<'de> for Value<'_> {
    type Error = OptionError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_str(self.one()?)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        match self.one()? {
            "true" | "yes" | "on" => visitor.visit_bool(true),
            "false" | "no" | "off" => visitor.visit_bool(false),
            other => Err(OptionError(format!("{other:?} is neither on nor off"))),
        }
    }

    numbers! {
        deserialize_u8 visit_u8
        deserialize_u16 visit_u16
        deserialize_u32 visit_u32
        deserialize_u64 visit_u64
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, OptionError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_seq(Values(self.0.iter()))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, OptionError> {
        let name: StrDeserializer<'_, OptionError> = self.one()?.into_deserializer();
        visitor.visit_enum(name)
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple tuple_struct
        map struct identifier ignored_any
    }
}

/// The values of a key that takes a list.
struct Values<'a>(std::slice::Iter<'a, String>);

impl<'de> SeqAccess<'de> for Values<'_> {
    type Error = OptionError;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, OptionError> {
        self.0.next().map(|value| seed.deserialize(Value(std::slice::from_ref(value)))).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
    struct Sample {
        path: String,
        kind: Kind,
        read_only: bool,
        queues: Option<u8>,
        forward: Vec<String>,
    }

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Kind {
        #[default]
        Raw,
        Qcow2,
    }

    #[test]
    fn keys_words_lists_and_commas() {
        let s: Sample =
            parse("a,,b.img,kind=qcow2,read-only,queues=4,forward=x,forward=y=z", Some("path")).unwrap();
        let expected = Sample {
            path: "a,b.img".into(),
            kind: Kind::Qcow2,
            read_only: true,
            queues: Some(4),
            forward: vec!["x".into(), "y=z".into()],
        };
        assert_eq!(s, expected);
        assert_eq!(parse::<Sample>("", None).unwrap(), Sample::default());
    }

    #[test]
    fn errors_name_the_key_and_what_is_possible() {
        let error = |text| parse::<Sample>(text, Some("path")).unwrap_err().to_string();
        assert_eq!(
            error("x,kidn=raw"),
            "there is no key \"kidn\" (do you mean kind?): possible are path, kind, read-only, queues, forward"
        );
        assert_eq!(error("x,kind=vmdk"), "kind: there is no value \"vmdk\": possible are raw, qcow2");
        assert_eq!(error("x,read-only=perhaps"), "read-only: \"perhaps\" is neither on nor off");
        assert!(error("x,queues=300").starts_with("queues: \"300\" is not possible"));
        assert_eq!(error("x,path=y"), "path: it is given more than once");
        assert!(error("x,,=").contains("path") || error("x,=").contains("empty key"));
    }
}
