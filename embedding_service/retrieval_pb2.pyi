from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Key(_message.Message):
    __slots__ = ("integer", "string")
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    STRING_FIELD_NUMBER: _ClassVar[int]
    integer: int
    string: str
    def __init__(self, integer: _Optional[int] = ..., string: _Optional[str] = ...) -> None: ...

class Keys(_message.Message):
    __slots__ = ("integers", "strings")
    INTEGERS_FIELD_NUMBER: _ClassVar[int]
    STRINGS_FIELD_NUMBER: _ClassVar[int]
    integers: _containers.RepeatedScalarFieldContainer[int]
    strings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, integers: _Optional[_Iterable[int]] = ..., strings: _Optional[_Iterable[str]] = ...) -> None: ...

class Vector(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class Session(_message.Message):
    __slots__ = ("items", "user", "features")
    class FeaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Feature
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Feature, _Mapping]] = ...) -> None: ...
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    items: Keys
    user: Key
    features: _containers.MessageMap[str, Feature]
    def __init__(self, items: _Optional[_Union[Keys, _Mapping]] = ..., user: _Optional[_Union[Key, _Mapping]] = ..., features: _Optional[_Mapping[str, Feature]] = ...) -> None: ...

class Feature(_message.Message):
    __slots__ = ("keys", "numbers")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    keys: Keys
    numbers: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, keys: _Optional[_Union[Keys, _Mapping]] = ..., numbers: _Optional[_Iterable[float]] = ...) -> None: ...

class Filter(_message.Message):
    __slots__ = ("allow", "deny", "where")
    class WhereEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Values
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Values, _Mapping]] = ...) -> None: ...
    ALLOW_FIELD_NUMBER: _ClassVar[int]
    DENY_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    allow: Keys
    deny: Keys
    where: _containers.MessageMap[str, Values]
    def __init__(self, allow: _Optional[_Union[Keys, _Mapping]] = ..., deny: _Optional[_Union[Keys, _Mapping]] = ..., where: _Optional[_Mapping[str, Values]] = ...) -> None: ...

class Values(_message.Message):
    __slots__ = ("strings", "integers", "booleans")
    STRINGS_FIELD_NUMBER: _ClassVar[int]
    INTEGERS_FIELD_NUMBER: _ClassVar[int]
    BOOLEANS_FIELD_NUMBER: _ClassVar[int]
    strings: _containers.RepeatedScalarFieldContainer[str]
    integers: _containers.RepeatedScalarFieldContainer[int]
    booleans: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, strings: _Optional[_Iterable[str]] = ..., integers: _Optional[_Iterable[int]] = ..., booleans: _Optional[_Iterable[bool]] = ...) -> None: ...

class SimilarRequest(_message.Message):
    __slots__ = ("key", "keys", "k", "filter", "diversity")
    KEY_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    DIVERSITY_FIELD_NUMBER: _ClassVar[int]
    key: Key
    keys: Keys
    k: int
    filter: Filter
    diversity: float
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., keys: _Optional[_Union[Keys, _Mapping]] = ..., k: _Optional[int] = ..., filter: _Optional[_Union[Filter, _Mapping]] = ..., diversity: _Optional[float] = ...) -> None: ...

class RecommendRequest(_message.Message):
    __slots__ = ("session", "sessions", "k", "exclude_seen", "filter", "diversity", "explain")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_SEEN_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    DIVERSITY_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    session: Session
    sessions: _containers.RepeatedCompositeFieldContainer[Session]
    k: int
    exclude_seen: bool
    filter: Filter
    diversity: float
    explain: bool
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., sessions: _Optional[_Iterable[_Union[Session, _Mapping]]] = ..., k: _Optional[int] = ..., exclude_seen: _Optional[bool] = ..., filter: _Optional[_Union[Filter, _Mapping]] = ..., diversity: _Optional[float] = ..., explain: _Optional[bool] = ...) -> None: ...

class SearchRequest(_message.Message):
    __slots__ = ("vector", "vectors", "k", "filter", "diversity")
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    DIVERSITY_FIELD_NUMBER: _ClassVar[int]
    vector: Vector
    vectors: _containers.RepeatedCompositeFieldContainer[Vector]
    k: int
    filter: Filter
    diversity: float
    def __init__(self, vector: _Optional[_Union[Vector, _Mapping]] = ..., vectors: _Optional[_Iterable[_Union[Vector, _Mapping]]] = ..., k: _Optional[int] = ..., filter: _Optional[_Union[Filter, _Mapping]] = ..., diversity: _Optional[float] = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("keys", "sessions")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    keys: Keys
    sessions: _containers.RepeatedCompositeFieldContainer[Session]
    def __init__(self, keys: _Optional[_Union[Keys, _Mapping]] = ..., sessions: _Optional[_Iterable[_Union[Session, _Mapping]]] = ...) -> None: ...

class Answers(_message.Message):
    __slots__ = ("version", "answers", "partial")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    version: str
    answers: _containers.RepeatedCompositeFieldContainer[Answer]
    partial: Partial
    def __init__(self, version: _Optional[str] = ..., answers: _Optional[_Iterable[_Union[Answer, _Mapping]]] = ..., partial: _Optional[_Union[Partial, _Mapping]] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("keys", "scores", "cold_start", "unknown", "unknown_user", "because")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    COLD_START_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_USER_FIELD_NUMBER: _ClassVar[int]
    BECAUSE_FIELD_NUMBER: _ClassVar[int]
    keys: Keys
    scores: _containers.RepeatedScalarFieldContainer[float]
    cold_start: bool
    unknown: Keys
    unknown_user: bool
    because: _containers.RepeatedCompositeFieldContainer[Because]
    def __init__(self, keys: _Optional[_Union[Keys, _Mapping]] = ..., scores: _Optional[_Iterable[float]] = ..., cold_start: _Optional[bool] = ..., unknown: _Optional[_Union[Keys, _Mapping]] = ..., unknown_user: _Optional[bool] = ..., because: _Optional[_Iterable[_Union[Because, _Mapping]]] = ...) -> None: ...

class Because(_message.Message):
    __slots__ = ("keys", "contributions")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    keys: Keys
    contributions: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, keys: _Optional[_Union[Keys, _Mapping]] = ..., contributions: _Optional[_Iterable[float]] = ...) -> None: ...

class Partial(_message.Message):
    __slots__ = ("lost_shards", "num_shards")
    LOST_SHARDS_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    lost_shards: _containers.RepeatedScalarFieldContainer[int]
    num_shards: int
    def __init__(self, lost_shards: _Optional[_Iterable[int]] = ..., num_shards: _Optional[int] = ...) -> None: ...

class Embeddings(_message.Message):
    __slots__ = ("version", "vectors")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    version: str
    vectors: _containers.RepeatedCompositeFieldContainer[Vector]
    def __init__(self, version: _Optional[str] = ..., vectors: _Optional[_Iterable[_Union[Vector, _Mapping]]] = ...) -> None: ...
